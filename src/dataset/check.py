"""Examine a training or evaluation file before a run: every row, every clip, every prompt's length.

    python src/dataset/check.py data/AVQA/train_qa.data
    python src/dataset/check.py data/MMAU/mmau-test-mini.json --deep

Rows are held against the rules of `dataset.py` and `questions.py`, clips against those of `audio.py` (headers; with
--deep all samples), prompts against those of `encode.py`. Each bad row is reported by file and line (in a JSON list by
its number), then all by reason. Exit status: 0 if every row is usable, 1 if not, 2 if the file as a whole cannot be
examined.

Rows are read, examined and forgotten a thousand at a time, so memory does not grow with the file. Nothing is changed:
--keep_file writes the usable rows elsewhere. `train.py` calls `examine_training_file` before it loads a model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if not __package__:  # run as a script, from src/dataset: its packages are those of src
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from dataset.audio import CHANNELS, SAMPLE_RATE, ClipReport, DataError, examine_clip
from dataset.dataset import check_is_there, check_row, to_dataset, to_row
from dataset.encode import MAX_PROMPT_LENGTH, WINDOW_SECONDS, check_clip_length, check_prompt, count_text_tokens
from dataset.prompt import DEFAULT_STYLE, STYLES, build_question, get_style
from dataset.questions import UNKNOWN, check_question, recognise_release, to_question
from dataset.rows import SHOWN, Row, open_whole, read_lines, read_rows, starts_a_list

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MODEL = "Qwen/Qwen2-Audio-7B-Instruct"
ROWS_AT_ONCE = 1000
PATHS_PER_TASK = 16
# Headers: on a network disk it is waiting that takes the time. Samples: libsndfile decodes outside of Python's lock.
THREADS = max(8, os.cpu_count() or 1)
CLIPPED = 0.01  # share of samples at full scale from which a clip is noted


@dataclass(frozen=True)
class Rules:
    """What the rows of a file are held against, and how."""

    style: str = DEFAULT_STYLE
    processor: ProcessorMixin | None = None  # of the model; without: no prompt lengths, no special tokens
    max_prompt_length: int | None = MAX_PROMPT_LENGTH  # tokens, audio included; None is no limit
    channels: str = "first"  # that will be heard, see `load_audio`
    cut_long_clips: bool = False  # as evaluation does; else they are bad
    deep: bool = False  # decode every clip, for NaN, silence and clipping
    audio_dir: str | Path | None = None  # what an evaluation file's clips start from; default: the file's own folder
    workers: int | None = None  # threads that read clips; default: THREADS

    @property
    def window(self) -> int:
        """The longest clip that is heard in full, in samples; without a processor Qwen2-Audio's."""
        return self.processor.feature_extractor.n_samples if self.processor else WINDOW_SECONDS * SAMPLE_RATE


@dataclass
class Examined:
    """One row on its way through the examination."""

    row: Row
    id: object = None
    data: dict = field(default_factory=dict)  # `prompt`, `audio_path` and what else is wanted of a usable row
    notes: list[str] = field(default_factory=list)  # what is only worth knowing
    error: DataError | None = None
    samples: int = 0  # of the clip
    tokens: int = 0  # of the prompt; 0 without a processor


Rule = Callable[[dict, int], tuple[dict, list[str]]]  # parsed row, its number -> `data`, `notes`; or a `DataError`


@dataclass
class Examination:
    """What was found in a file; of the rows themselves only numbers are kept."""

    file: Path
    kind: str = "training file"
    rows: int = 0
    dropped: array = field(default_factory=lambda: array("q"))  # row numbers (line numbers in JSONL)
    reasons: Counter = field(default_factory=Counter)  # of the dropped rows, and how many
    notes: Counter = field(default_factory=Counter)  # of usable rows
    examples: dict[str, str] = field(default_factory=dict)  # reason or note -> its first row
    shown: list[str] = field(default_factory=list)  # the first bad rows
    seconds: float = 0.0  # of audio in the usable rows
    shortest: float = float("inf")  # s
    longest: float = 0.0  # s
    longest_prompt: tuple[int, str] | None = None  # tokens, and where; None where they were not counted
    dataset: Dataset | None = None  # the usable rows of a training file

    @property
    def usable(self) -> int:
        return self.rows - len(self.dropped)

    def enter(self, examined: Examined) -> None:
        """Count a row, usable or not."""
        self.rows += 1
        where = examined.row.where
        if (error := examined.error) is not None:
            self.dropped.append(examined.row.number)
            self.reasons[error.reason] += 1
            self.examples.setdefault(error.reason, f"{where}: {error}")
            if len(self.shown) < SHOWN:
                self.shown.append(f"{self.file}, {where}: {error}")
            return
        for note in examined.notes:
            self.notes[note] += 1
            self.examples.setdefault(note, where)
        seconds = examined.samples / SAMPLE_RATE
        self.seconds += seconds
        self.shortest, self.longest = min(self.shortest, seconds), max(self.longest, seconds)
        if examined.tokens:
            self.longest_prompt = max(self.longest_prompt or (0, ""), (examined.tokens, where))

    def table(self) -> str:
        """What was found, a line for each reason: how many rows, and the first of them."""
        share = f" ({len(self.dropped) / self.rows:.1%})" if self.rows else ""
        dropped = f"{len(self.dropped)} dropped{share}"
        lines = [f"{self.file}: {self.kind}, {self.rows} rows, {self.usable} usable, {dropped}"]
        for counts, title in ((self.reasons, ""), (self.notes, "  kept, but worth knowing:")):
            lines += [title] if title and counts else []
            width = max((len(reason) for reason in counts), default=0)
            for reason, count in counts.most_common():
                lines.append(f"  {count:>8}  {reason:<{width}}  {self.examples.get(reason, ''):.120}".rstrip())
        if self.seconds:
            tokens = ", longest prompt {} tokens ({})".format(*self.longest_prompt) if self.longest_prompt else ""
            clips = f"{self.seconds / 3600:.2f} h of audio, clips of {self.shortest:.2f} to {self.longest:.2f} s"
            lines.append(f"  {clips}{tokens}")
        return "\n".join(lines)

    def check_share(self, max_dropped: float) -> None:
        """Raise a `ValueError` with the table where more than this share of the rows was dropped, or no row is left."""
        if not self.usable:
            raise ValueError(f"no usable row is left\n{self.table()}")
        if len(self.dropped) > max_dropped * self.rows:
            raise ValueError(f"more than {max_dropped:.0%} of the rows are unusable (--max_dropped)\n{self.table()}")


def examine_training_file(
    data_file: str | Path, rules: Rules = Rules(), *, dropped_file: str | Path | None = None, progress: bool = False
) -> Examination:
    """Examine a training file and load what is usable of it.

    Args:
        data_file: JSONL, as for `load_train_dataset`.
        dropped_file: gets the bad rows as JSONL: `line`, `id`, `reason`, `message`, `text`; removed without any.
        progress: show a bar.

    Returns:
        The examination, its `dataset` as `load_train_dataset` would make it of the usable rows. Other processes get the
        same from `load_train_dataset(data_file, style, skip=set(examination.dropped))` without opening a clip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no rows.
    """
    get_style(rules.style)
    examination = Examination(data_file := check_is_there(data_file))

    def rule(record: dict, number: int) -> tuple[dict, list[str]]:
        return to_row(record, number, rules.style, data_file.parent), check_row(record)

    total = sum(1 for _ in read_lines(data_file)) if progress else None
    rows = tqdm(read_lines(data_file), total=total, disable=not progress, unit=" rows")
    good = _examine(rows, rule, examination, rules, dropped_file)
    examination.dataset = to_dataset(examined.data for examined in good)
    if not examination.rows:
        raise ValueError(f"{data_file}: holds no rows; data/README.md shows the format")
    return examination


def examine_evaluation_file(
    data_file: str | Path, rules: Rules = Rules(), *, dropped_file: str | Path | None = None, progress: bool = False
) -> Examination:
    """Examine MMAU's JSON list or MMAR's JSONL as `examine_training_file` does a training file; there is no `dataset`.

    Clips over the window are noted only, since evaluation cuts them as the paper did, and prompts may be of any length.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or holds no rows.
    """
    get_style(rules.style)
    examination = Examination(data_file := check_is_there(data_file))
    audio_dir, ids, records = Path(rules.audio_dir or data_file.parent), {}, []

    def rule(record: dict, number: int) -> tuple[dict, list[str]]:
        records.append(record)
        question = to_question(record, number, audio_dir, ids)
        notes = check_question(question, audio_dir)
        text = build_question(question.record["question"], question.record["choices"], rules.style)
        return {"prompt": text, "audio_path": question.audio_path}, notes

    rows = tqdm(list(read_rows(data_file)), disable=not progress, unit=" rows")
    rules = replace(rules, max_prompt_length=None, cut_long_clips=True)
    list(_examine(rows, rule, examination, rules, dropped_file))
    if not examination.rows:
        raise ValueError(f"{data_file}: holds no questions")
    release = recognise_release(records)
    examination.kind = "evaluation file" if release == UNKNOWN else f"evaluation file, MMAU release {release}"
    return examination


def is_training_file(data_file: str | Path) -> bool:
    """Whether a file is in AVQA's training format (JSONL with `multi_choice`), not in an evaluation's.

    Raises:
        ValueError: it is AVQA's own annotation file, which has to be converted first.
    """
    if starts_a_list(data_file):
        with open(data_file, "rb") as file:
            if b'"multi_choice"' in file.read(2**16):
                remedy = "data/prepare_avqa.py makes a training file of them"
                raise ValueError(f"{data_file}: AVQA's own annotations; {remedy}")
        return False
    for row in islice(read_lines(data_file), 100):
        try:
            return "choices" not in row.parse()
        except DataError:
            continue
    return True


# Examining


def _examine(
    rows: Iterable[Row], rule: Rule, examination: Examination, rules: Rules, dropped_file: str | Path | None
) -> Iterator[Examined]:
    """Yield the usable rows, in order; enter all of them into the examination, and the others into `dropped_file`."""
    hashes = array("q")  # of the ids, to count those that repeat in however long a file
    rows = iter(rows)
    with ThreadPoolExecutor(rules.workers or THREADS) as pool, _open_dropped(dropped_file) as file:
        while chunk := [_read(row, rule) for row in islice(rows, ROWS_AT_ONCE)]:
            _examine_chunk([examined for examined in chunk if not examined.error], rules, pool)
            for examined in chunk:
                examination.enter(examined)
                if examined.error is None:
                    if examined.id is not None:
                        hashes.append(hash(str(examined.id)))
                    yield examined
                elif file:
                    entry = {"line": examined.row.number, "id": examined.id, "reason": examined.error.reason}
                    text = examined.row.text.decode("utf-8", "backslashreplace").strip()[:2000]
                    file.write(json.dumps(entry | {"message": str(examined.error), "text": text}) + "\n")
    if repeated := len(hashes) - len(np.unique(hashes)):
        examination.notes["id repeated"] = repeated


def _read(row: Row, rule: Rule) -> Examined:
    examined = Examined(row)
    try:
        record = row.parse()
        examined.id = record.get("id")
        examined.data, examined.notes = rule(record, row.number)
    except DataError as error:
        examined.error = error
    return examined


def _examine_chunk(chunk: list[Examined], rules: Rules, pool: ThreadPoolExecutor) -> None:
    """Examine the prompts and clips of rows that were read; fills in what they lack."""
    paths = list(dict.fromkeys(examined.data["audio_path"] for examined in chunk))
    parts = [paths[start : start + PATHS_PER_TASK] for start in range(0, len(paths), PATHS_PER_TASK)]
    found = chain.from_iterable(pool.map(partial(_examine_clips, rules), parts))
    reports = dict(zip(paths, found, strict=True))
    text_tokens = [0] * len(chunk)
    if rules.processor and chunk:
        text_tokens = count_text_tokens(rules.processor, [examined.data["prompt"] for examined in chunk])
    for examined, tokens in zip(chunk, text_tokens, strict=True):
        report = reports[path := examined.data["audio_path"]]
        if isinstance(report, DataError):
            examined.error = report
            continue
        heard = examined.samples = report.samples
        if rules.cut_long_clips and heard > rules.window:
            examined.notes.append(f"clip over {rules.window / SAMPLE_RATE:g} s, will be cut")
            heard = rules.window
        if report.clipped > CLIPPED:
            examined.notes.append("clip overdriven (over 1% of its samples at full scale)")
        try:
            if rules.processor is None:
                check_clip_length(heard, None)
            else:
                prompt = examined.data["prompt"]
                examined.tokens = check_prompt(prompt, heard, tokens, rules.processor, rules.max_prompt_length)
        except DataError as error:
            examined.error = DataError(f"{path}: {error}", error.reason)


def _examine_clips(rules: Rules, paths: list[str]) -> list[ClipReport | DataError]:
    longest = float("inf") if rules.cut_long_clips else rules.window
    return [examine_clip(path, rules.deep, rules.channels, longest) for path in paths]


@contextmanager
def _open_dropped(path: str | Path | None) -> Iterator[TextIO | None]:
    """A file for the bad rows, which is there in the end if there were any."""
    if path is None:
        yield None
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_whole(path) as file:
        yield file
    if not path.stat().st_size:
        path.unlink()


# Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Examine a training or evaluation file: rows, clips, prompt lengths.")
    add = parser.add_argument
    add("file", help="training JSONL, MMAU's JSON or MMAR's JSONL")
    add("--model_path", help=f"whose processor counts the prompt's tokens; `none` does without; default: {MODEL}")
    add("--prompt_style", choices=STYLES, default=DEFAULT_STYLE, help="of the prompts that are counted")
    add("--max_prompt_length", type=int, default=MAX_PROMPT_LENGTH, help="tokens, audio included; of training files")
    add("--audio_dir", help="what an evaluation file's clips start from; default: the file's own folder")
    add("--audio_channels", choices=CHANNELS, default="first", help="channel(s) of a clip that --deep listens to")
    add("--deep", action="store_true", help="decode every clip: NaN, silence, overdriven, damaged in the middle")
    add("--workers", type=int, help="threads that read clips; default: one per core, at least 8")
    add("--dropped_file", help="write the bad rows here, as JSONL with the reasons")
    add("--keep_file", help="write the usable rows of a training file here, as they are")
    return parser.parse_args(argv)


def load_processor(name: str | None) -> ProcessorMixin | None:
    """The processor that counts tokens; None for `none`, and, with a word about it, where the default is not here."""
    if name == "none":
        return None
    from transformers import AutoProcessor  # takes seconds, which `none` need not wait

    try:
        processor = AutoProcessor.from_pretrained(name or MODEL)
        if not hasattr(processor, "feature_extractor"):
            raise ValueError(f"it is a {type(processor).__name__}, which takes no audio")
        return processor
    except (OSError, ValueError) as error:
        if name:
            why = str(error).partition("\n")[0]
            raise ValueError(f"{name}: no processor can be loaded from it ({why})") from error
        print(f"prompt lengths are not checked, {MODEL} is not here: --model_path names a folder", file=sys.stderr)
        return None


def write_kept(data_file: Path, dropped: Container[int], keep_file: str | Path) -> None:
    """Copy the lines of a training file that were not dropped, byte for byte.

    Raises:
        ValueError: `keep_file` lies in another folder than relative audio paths start from, or is the file itself.
    """
    keep_file = Path(keep_file)
    if keep_file.resolve().parent != data_file.resolve().parent or keep_file.resolve() == data_file.resolve():
        raise ValueError(f"{keep_file}: relative audio paths start from {data_file.parent}: choose another name there")
    with open(keep_file, "wb") as file:
        file.writelines(row.text for row in read_lines(data_file) if row.number not in dropped)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        training = is_training_file(check_is_there(args.file))
        processor = load_processor(args.model_path)
        rules = Rules(
            args.prompt_style, processor, args.max_prompt_length, args.audio_channels,
            deep=args.deep, audio_dir=args.audio_dir, workers=args.workers,
        )  # fmt: skip
        examine = examine_training_file if training else examine_evaluation_file
        examination = examine(args.file, rules, dropped_file=args.dropped_file, progress=sys.stderr.isatty())
        if args.keep_file and training:
            write_kept(examination.file, set(examination.dropped), args.keep_file)
    except (ValueError, OSError) as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    for message in examination.shown:
        print(message)
    if len(examination.dropped) > len(examination.shown):
        print(f"... and {len(examination.dropped) - len(examination.shown)} more (--dropped_file writes all)")
    print(examination.table())
    return 1 if examination.dropped else 0


if __name__ == "__main__":
    sys.exit(main())
