"""Lay out MMAU for evaluation, from its repository's files or from the hub.

    python data/prepare_mmau.py                               mmau-test-mini.json, test-mini-audios.tar.gz in data/MMAU
    python data/prepare_mmau.py --json FILE --audio TAR ...   both from elsewhere; folders of clips do, too
    python data/prepare_mmau.py --hub                         gamma-lab-umd/MMAU-test-mini, downloaded by `datasets`

    data/MMAU/mmau-test-mini.json, test-mini-audios/             the original release, which the paper used
    data/MMAU/v05.15.25/mmau-test-mini.json, test-mini-audios/   the revised one; its drafts: v05.15.25-draft/

The questions tell the release; --release is needed if they do not, as for the full test's 9000 questions. Clips are
written byte for byte. An interrupted run resumes when it is started again. `src/run/check.py --deep` decodes the clips.
"""

import json
import re
import sys
import tarfile
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from datasets import Audio, Dataset, load_dataset
from datasets.exceptions import DatasetsError
from tqdm import tqdm

from dataset.questions import ORIGINAL, REVISED, UNKNOWN, recognise_release, to_benchmark
from dataset.rows import first_problems, read_records
from evaluation.files import write_whole

HUB = "gamma-lab-umd/MMAU-test-mini"
PREFIX = re.compile(r"\s*\([A-Z]\)\s*")  # of the hub's choices and answers
SHOWN = 10  # missing clips listed


# Sources: records with keys as in MMAU's own JSON, and clips as (file name, content)


def read_hub(name: str, revision: str | None, split: str) -> tuple[list[dict], Iterator[tuple[str, bytes]]]:
    """MMAU as the hub has it: a data set's name, a folder with its parquet files, or a single one of them.

    Raises:
        ValueError: it cannot be had, or is not in MMAU's hub format.
    """
    try:
        if Path(name).is_file():
            table = load_dataset("parquet", data_files=name, split="train")
        else:
            table = load_dataset(name, split=split, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{name}: cannot be loaded ({why}); is the name right, and the hub within reach?") from error
    needed = {"context", "instruction", "choices", "answer", "other_attributes"}
    if lacking := sorted(needed - set(table.column_names)):
        raise ValueError(f"{name}: has no column {', '.join(lacking)}; it is not in the format of {HUB}")
    if isinstance(table.features["context"], Audio):
        table = table.cast_column("context", Audio(decode=False))
    texts = table.remove_columns("context")
    records = [hub_record(row, number) for number, row in enumerate(texts, start=1)]
    return records, hub_clips(table, records)


def hub_record(row: dict, number: int) -> dict:
    """A row of the hub as MMAU's JSON has it: `(A) ` prefixes removed, attributes unpacked.

    Raises:
        ValueError: names the row and what is wrong with it.
    """
    try:
        attributes = json.loads(row["other_attributes"])
        id_ = attributes.pop("id")
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"row {number}: `other_attributes` is no JSON object with an id ({error!r})") from error
    for key, value in attributes.items():
        if isinstance(value, list) and len(value) == 1:  # the category of a few rows
            attributes[key] = value[0]
    *choices, answer = remove_prefixes(row["choices"], row["answer"] or "")
    record = {"id": id_, "audio_id": f"./{clips_folder(attributes)}/{id_}.wav", "question": row["instruction"]}
    return record | {"choices": choices, "answer": answer} | attributes


def remove_prefixes(choices: list[str], answer: str) -> list[str]:
    """Choices and answer without letters, if all choices are lettered in order: a lone `(A)` may be part of a text.

    >>> remove_prefixes(["(A) Man", "(B) Woman"], "(B) Woman")
    ['Man', 'Woman', 'Woman']
    """
    lettered = all(choice.lstrip().startswith(f"({chr(ord('A') + i)})") for i, choice in enumerate(choices))
    return [PREFIX.sub("", text, count=1) if lettered else text for text in (*choices, answer)]


def clips_folder(record: dict) -> str:
    return "test-audios" if record.get("split") == "test" else "test-mini-audios"


def hub_clips(table: Dataset, records: list[dict]) -> Iterator[tuple[str, bytes]]:
    for record, row in zip(records, table.select_columns("context"), strict=True):
        if row["context"] and row["context"].get("bytes"):
            yield Path(record["audio_id"]).name, row["context"]["bytes"]


def read_files(question_file: Path, audio: list[Path]) -> tuple[list[dict], Iterator[tuple[str, bytes]]]:
    """MMAU as its repository has it: the JSON, and tar files or folders of clips.

    Raises:
        ValueError: one of them is missing or is not what it should be.
    """
    for path in (question_file, *audio):
        if not path.exists():
            raise ValueError(f"{path}: no such file; data/README.md says where MMAU is")
    return read_records(question_file), file_clips(audio)


def file_clips(audio: list[Path]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file in tar files and folders; the folders inside them do not matter."""
    for path in audio:
        try:
            if path.is_dir():
                yield from ((clip.name, clip.read_bytes()) for clip in sorted(path.rglob("*")) if clip.is_file())
                continue
            with tarfile.open(path) as archive:
                for member in archive:
                    # Neither links nor devices; of its path only the last part is used.
                    if member.isfile() and (file := archive.extractfile(member)):
                        yield Path(member.name).name, file.read()
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"{path}: cannot be unpacked ({error}); download it again") from error


# Layout


def choose_release(found: str, wanted: str | None) -> str:
    """The release by which a folder is named.

    Args:
        found: what the questions tell, see `recognise_release`.

    Raises:
        ValueError: they do not tell it, or it is another one than `wanted`.
    """
    release = found.partition(" ")[0]
    if release == UNKNOWN and wanted is None:
        raise ValueError(f"the questions are {found}; set --release {ORIGINAL} or --release {REVISED}")
    if release != UNKNOWN and wanted not in (None, release):
        raise ValueError(f"the questions are of release {found}, not {wanted}")
    return wanted or release


def lay_out(records: list[dict], clips: Iterable[tuple[str, bytes]], folder: Path) -> list[str]:
    """Write the questions and those clips that they name.

    Returns:
        The names of the clips that are missing.

    Raises:
        ValueError: a row is not in MMAU's format, names a clip outside of its folder, or other questions lie there.
    """
    to_benchmark(records, folder, folder)
    places = {}  # a clip's name -> where it goes
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("audio_id"), str):
            raise ValueError(f"row {number}: `audio_id` is missing or no text")
        place = Path(record["audio_id"])
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"row {number}: `audio_id` {record['audio_id']!r} leads out of the data folder")
        places[place.name] = folder / place
    question_file = folder / ("mmau-test.json" if clips_folder(records[0]) == "test-audios" else "mmau-test-mini.json")
    text = json.dumps(records, indent=2) + "\n"
    if question_file.is_file() and read_records(question_file) != records:
        raise ValueError(f"{question_file}: holds other questions; move it away, or choose another --out")
    for name, content in tqdm(clips, unit=" clips", disable=None):
        if name in places and content:
            write_clip(places[name], content)
    if not question_file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(question_file, text)
    return [name for name, place in places.items() if not place.is_file()]


def write_clip(path: Path, content: bytes) -> None:
    """The clip appears whole or not at all; one of the same size is taken for the same."""
    if path.is_file() and path.stat().st_size == len(content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def find_files(out: Path) -> tuple[Path, list[Path]]:
    """The repository's files where its README has them unpacked: in `out`.

    Raises:
        ValueError: they are not there; says both ways to get them.
    """
    question_file = out / "mmau-test-mini.json"
    audio = sorted(path for pattern in ("test*-audios", "test*-audios*.tar*", "*.tgz") for path in out.glob(pattern))
    if not question_file.is_file() or not audio:
        raise ValueError(
            f"{out} does not hold mmau-test-mini.json and test-mini-audios.tar.gz. Get both from "
            "https://github.com/Sakshi113/MMAU and say where they are with --json and --audio; or take --hub"
        )
    return question_file, audio


def prepare(args: Namespace) -> int:
    out = Path(args.out)
    if args.hub:
        records, clips = read_hub(args.hub, args.revision, args.split)
    else:
        question_file, audio = (Path(args.json), [Path(path) for path in args.audio]) if args.json else find_files(out)
        records, clips = read_files(question_file, audio)
    if not records:
        raise ValueError("the source holds no questions")
    found = recognise_release(records)
    release = choose_release(found, args.release)
    folder = out if release == ORIGINAL else out / release
    missing = lay_out(records, clips, folder)
    print(f"{folder}: release {found}, {len(records)} questions, {len(missing)} without a clip")
    if missing:
        print("  " + first_problems((f"missing: {name}" for name in missing), SHOWN))
    print(f"evaluate with: MMAU_DIR={folder} sh test_mmau.sh")
    return 1 if missing else 0


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description="Lay out MMAU for evaluation.", allow_abbrev=False)
    add = parser.add_argument
    add("--json", help="mmau-test-mini.json (or the full test's) of the repository; default: the one in --out")
    add("--audio", nargs="+", default=[], help="its tar files, or folders of clips")
    add("--hub", nargs="?", const=HUB, help=f"a data set's name, or its parquet files here; without a value: {HUB}")
    add("--revision", help="commit or tag of the data set on the hub; default: its newest")
    add("--split", default="test", help="of the data set on the hub")
    add("--out", default="data/MMAU", help="the original release goes here, others to folders of their names")
    add("--release", choices=(ORIGINAL, REVISED), help="default: as the questions tell")
    args = parser.parse_args(argv)
    if args.json and (args.hub or not args.audio):
        parser.error("--json goes with --audio, and not with --hub")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return prepare(args)
    except (ValueError, OSError) as error:
        print(f"prepare_mmau.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_mmau.py: interrupted; start it again to resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
