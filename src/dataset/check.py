"""Examine a training or evaluation file before a run: every row, every clip, every prompt's length.

    python src/dataset/check.py data/AVQA/train_qa.data
    python src/dataset/check.py data/MMAU/mmau-test-mini.json --deep

Rows are held against the rules of `dataset.py`, clips against those of `audio.py` (headers; with --deep all samples),
prompts against those of `encode.py`. Each bad row is reported by file and line, then all by reason. Exit status: 0 if
every row is usable, 1 if not, 2 if the file as a whole cannot be examined.

Rows are read, examined and forgotten a thousand at a time, so memory does not grow with the file. Nothing is changed:
--keep_file writes the usable rows elsewhere. `train.py` calls `examine_training_file` before it loads a model.
"""

from __future__ import annotations

import argparse
import codecs
import json
import multiprocessing
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script, from src/dataset: its packages are those of src
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from dataset.audio import CHANNELS, SAMPLE_RATE, ClipReport, DataError, examine_clip
from dataset.dataset import check_is_there, check_question, check_row, parse_line, read_lines, to_dataset, to_row
from dataset.encode import MAX_PROMPT_LENGTH, WINDOW_SECONDS, check_clip_length, check_prompt, count_text_tokens
from dataset.prompt import DEFAULT_STYLE, STYLES, build_question, check_style
from dataset.questions import UNKNOWN, recognise_release, to_benchmark

if TYPE_CHECKING:
    from transformers import Qwen2AudioProcessor

MODEL = "Qwen/Qwen2-Audio-7B-Instruct"
ROWS_AT_ONCE = 1000
PATHS_PER_TASK = 16
THREADS = 8  # that read headers: on a network disk it is waiting that takes the time
SHOWN = 20  # bad rows listed
CLIPPED = 0.01  # share of samples at full scale from which a clip is noted


@dataclass
class Rules:
    """What the rows of a file are held against."""

    processor: Qwen2AudioProcessor | None = None  # without: no prompt lengths, no special tokens
    max_prompt_length: int | None = None  # tokens, audio included
    deep: bool = False
    channels: str = "first"
    cut_long_clips: bool = False  # as evaluation does; else they are bad

    @property
    def window(self) -> int:
        """The longest clip that is heard in full, in samples."""
        return self.processor.feature_extractor.n_samples if self.processor else WINDOW_SECONDS * SAMPLE_RATE


@dataclass
class Row:
    """One row on its way through the examination."""

    number: int  # of the row, from 1
    line: int  # where it starts in the file, from 1
    source: str | bytes  # as it is in the file
    id: object = None
    data: dict | None = None  # `prompt`, `audio_path` and what else a data set of it needs
    error: DataError | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"line {self.line}" + (f", row {self.number}" if self.number != self.line else "")


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

    def table(self) -> str:
        """What was found, a line for each reason: how many rows, and the first of them."""
        share = f" ({len(self.dropped) / self.rows:.1%})" if self.rows else ""
        dropped = f"{len(self.dropped)} dropped{share}"
        lines = [f"{self.file}: {self.kind}, {self.rows} rows, {self.usable} usable, {dropped}"]
        for counts, title in ((self.reasons, ""), (self.notes, "  kept, but worth knowing:")):
            lines += [title] if title and counts else []
            width = max((len(reason) for reason in counts), default=0)
            for reason, count in counts.most_common():
                lines.append(f"  {count:>8}  {reason:<{width}}  {self.examples[reason]:.120}".rstrip())
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
    data_file: str | Path,
    style: str = DEFAULT_STYLE,
    processor: Qwen2AudioProcessor | None = None,
    max_prompt_length: int | None = MAX_PROMPT_LENGTH,
    *,
    dropped_file: str | Path | None = None,
    deep: bool = False,
    channels: str = "first",
    workers: int | None = None,
    progress: bool = False,
) -> Examination:
    """Examine a training file and load what is usable of it.

    Args:
        data_file: JSONL, as for `load_train_dataset`.
        style: prompt style.
        processor: of the model to train; without it prompts are neither counted nor searched for special tokens, and
            the window is Qwen2-Audio's.
        max_prompt_length: in tokens, audio included; None is no limit.
        dropped_file: gets the bad rows as JSONL: `line`, `id`, `reason`, `message`, `text`; removed without any.
        deep: decode every clip, in `workers` processes (default: one per core), for NaN, silence and clipping.
        channels: that will be heard, see `load_audio`.
        progress: show a bar.

    Returns:
        The examination, its `dataset` as `load_train_dataset` would make it of the usable rows. Other processes get the
        same from `load_train_dataset(data_file, style, skip=set(examination.dropped))` without opening a clip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no rows.
    """
    check_style(style)
    data_file = check_is_there(data_file)
    examination = Examination(data_file)
    rules = Rules(processor, max_prompt_length, deep, channels)
    rows = tqdm(
        (_training_row(number, line, style, data_file.parent) for number, line in read_lines(data_file)),
        total=_count_lines(data_file) if progress else None,
        disable=not progress,
        unit=" rows",
    )
    good = _examine(rows, examination, rules, workers, dropped_file, repeated_ids_are_bad=False)
    examination.dataset = to_dataset(row.data for row in good)
    if not examination.rows:
        raise ValueError(f"{data_file}: holds no rows; data/README.md shows the format")
    return examination


def examine_evaluation_file(
    data_file: str | Path,
    style: str = DEFAULT_STYLE,
    processor: Qwen2AudioProcessor | None = None,
    *,
    audio_dir: str | Path | None = None,
    dropped_file: str | Path | None = None,
    deep: bool = False,
    channels: str = "first",
    workers: int | None = None,
    progress: bool = False,
) -> Examination:
    """Examine MMAU's JSON list or MMAR's JSONL, with the arguments of `examine_training_file`; it has no `dataset`.

    Clips over the window are noted only, since evaluation cuts them as the paper did.

    Args:
        audio_dir: what the clips' paths start from; the file's own folder by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or holds no rows.
    """
    check_style(style)
    data_file = check_is_there(data_file)
    examination = Examination(data_file)
    rules = Rules(processor, None, deep, channels, cut_long_clips=True)
    audio_dir = Path(audio_dir or data_file.parent)
    rows = [_evaluation_row(row, style, audio_dir) for row in _read_evaluation_rows(data_file)]
    bar = tqdm(rows, disable=not progress, unit=" rows")
    good = _examine(bar, examination, rules, workers, dropped_file, repeated_ids_are_bad=True)
    records = [row.data["record"] for row in good]
    if not rows:
        raise ValueError(f"{data_file}: holds no questions")
    release = recognise_release(records)
    examination.kind = "evaluation file" if release == UNKNOWN else f"evaluation file, MMAU release {release}"
    return examination


def is_training_file(data_file: str | Path) -> bool:
    """Whether a file is in AVQA's training format (JSONL with `multi_choice`), not in an evaluation's.

    Raises:
        ValueError: it is AVQA's own annotation file, which has to be converted first.
    """
    with open(data_file, "rb") as file:
        head = file.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        if b'"multi_choice"' in head:
            raise ValueError(f"{data_file}: AVQA's own annotations; data/prepare_avqa.py makes a training file of them")
        return False
    for _, line in islice(read_lines(data_file), 100):
        try:
            return "choices" not in parse_line(line)
        except DataError:
            continue
    return True


# Reading


def _training_row(number: int, line: bytes, style: str, folder: Path) -> Row:
    row = Row(number, number, line)
    try:
        record = parse_line(line)
        row.id = record.get("id")
        row.data = to_row(record, number, style, folder)
        row.notes = check_row(record)
    except DataError as error:
        row.error = error
    return row


def _read_evaluation_rows(path: Path) -> Iterator[tuple[int, int, str | bytes, object]]:
    """Yield (row number, line it starts on, text, JSON value or `DataError`) of a JSON list or of JSONL."""
    data = path.read_bytes()
    if data.startswith(codecs.BOM_UTF8):
        raise ValueError(f"{path}: starts with a byte-order mark; save the file as UTF-8 without one")
    if not data.lstrip().startswith(b"["):
        for number, line in read_lines(path):
            try:
                yield number, number, line, parse_line(line)
            except DataError as error:
                yield number, number, line, error
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    yield from _read_json_list(path, text)


def _read_json_list(path: Path, text: str) -> Iterator[tuple[int, int, str, object]]:
    """As `_read_evaluation_rows`; `json` alone would not say on which line a row starts."""
    decoder = json.JSONDecoder()
    number, line, counted = 0, 1, 0

    def skip(index: int, characters: str = " \t\r\n") -> int:
        while index < len(text) and text[index] in characters:
            index += 1
        return index

    try:
        index = skip(skip(0) + 1)
        more = text[index : index + 1] != "]"
        while more:
            value, end = decoder.raw_decode(text, index)
            number += 1
            line, counted = line + text.count("\n", counted, index), index
            yield number, line, text[index:end], value
            index = skip(end)
            more = text[index : index + 1] == ","
            if not more and text[index : index + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, index)
            index = skip(index + 1) if more else index
        if (index := skip(index + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, index)
    except (ValueError, RecursionError) as error:
        where = f"line {getattr(error, 'lineno', line)}"
        raise ValueError(f"{path}, {where}: not JSON ({error}); a list or one object per line is needed") from error


def _evaluation_row(read: tuple[int, int, str | bytes, object], style: str, audio_dir: Path) -> Row:
    number, line, source, record = read
    row = Row(number, line, source)
    try:
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, dict):
            message = f"a JSON {type(record).__name__}, not an object with the keys of the format"
            raise DataError(message, "not a JSON object")
        row.id = record.get("id")
        row.notes = _check_evaluation_record(record, audio_dir)
        text = build_question(record["question"], record["choices"], style)
        row.data = {"prompt": text, "audio_path": _clip_of(record, audio_dir), "record": record}
    except DataError as error:
        row.error = error
    return row


def _check_evaluation_record(record: dict, audio_dir: Path) -> list[str]:
    """Raise a `DataError` for what keeps a question from being asked or scored; return notes."""
    clip_key = "audio_path" if "audio_path" in record and not record.get("audio_id") else "audio_id"
    for key, kind in (("question", str), ("choices", list), (clip_key, str)):
        value = record.get(key)
        if not isinstance(value, kind) or not value:
            what = "empty" if isinstance(value, kind) else "missing" if value is None else "of the wrong type"
            raise DataError(f"`{key}` is {what}; data/README.md shows the format", f"`{key}` {what}")
    notes = check_question(record["question"], record["choices"], "choices")
    answer = record.get("answer")
    if answer not in record["choices"] and not (answer in (None, "") and record.get("split") == "test"):
        message = f"`answer` is {answer!r:.80}, which is none of the choices; mend the row"
        raise DataError(message, "`answer` not among the choices")
    folder = os.path.abspath(audio_dir)
    if os.path.commonpath([folder, os.path.normpath(os.path.join(folder, record[clip_key]))]) != folder:
        message = f"`{clip_key}` {record[clip_key]!r:.200} leads out of the data folder {folder}; move the clip into it"
        raise DataError(message, "clip outside the data folder")
    return notes


def _clip_of(record: dict, audio_dir: Path) -> str:
    """The clip's path as evaluation resolves it."""
    try:
        return to_benchmark([record], Path(), audio_dir).questions[0].audio_path
    except (ValueError, OSError) as error:
        raise DataError(f"evaluation refuses the row: {error}", "refused by evaluation") from error


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(partial(file.read, 2**20), b""))


# Examining


def _examine(
    rows: Iterable[Row],
    examination: Examination,
    rules: Rules,
    workers: int | None,
    dropped_file: str | Path | None,
    repeated_ids_are_bad: bool,
) -> Iterator[Row]:
    """Yield the usable rows, in order; enter all others into the examination and into `dropped_file`."""
    ids = _Ids()
    rows = iter(rows)
    with _clip_examiner(rules, workers) as examine_clips, _dropped_rows(dropped_file) as write:

        def drop(row: Row) -> None:
            reason, message = row.error.reason, f"{row.where}: {row.error}"
            examination.dropped.append(row.number)
            examination.reasons[reason] += 1
            examination.examples.setdefault(reason, message)
            if len(examination.shown) < SHOWN:
                examination.shown.append(f"{examination.file}, {message}")
            write(row)

        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            _examine_chunk(chunk, examination, rules, examine_clips)
            for row in chunk:
                examination.rows += 1
                if row.error is None and row.id is not None and (first := ids.add(row, exact=repeated_ids_are_bad)):
                    row.error = DataError(f"the id {row.id!r} is that of {first} too; make it unique", "id repeated")
                if row.error is not None:
                    drop(row)
                    continue
                for note in row.notes:
                    examination.notes[note] += 1
                    examination.examples.setdefault(note, row.where)
                yield row
    if repeated := ids.count_repeated():
        examination.notes["id repeated"] = repeated
        examination.examples.setdefault("id repeated", "")


def _examine_chunk(chunk: list[Row], examination: Examination, rules: Rules, examine_clips: Callable) -> None:
    """Examine the prompts and clips of rows that were read; sets `error` and `notes`."""
    rows = [row for row in chunk if row.error is None]
    paths = dict.fromkeys(row.data["audio_path"] for row in rows)
    reports: dict[str, ClipReport | DataError] = dict(zip(paths, examine_clips(paths), strict=True))
    texts = list(dict.fromkeys(row.data["prompt"] for row in rows)) if rules.processor else []
    tokens = dict(zip(texts, count_text_tokens(rules.processor, texts), strict=True)) if texts else {}
    window = rules.window
    for row in rows:
        text, path = row.data["prompt"], row.data["audio_path"]
        report = reports[path]
        try:
            if isinstance(report, DataError):
                raise report
            samples = report.samples
            if rules.cut_long_clips and samples > window:
                row.notes.append(f"clip over {window / SAMPLE_RATE:g} s, will be cut")
                samples = window
            if rules.processor is None:
                check_clip_length(samples, None)
            else:
                length = check_prompt(text, samples, tokens[text], rules.processor, rules.max_prompt_length)
                examination.longest_prompt = max(examination.longest_prompt or (0, ""), (length, row.where))
        except DataError as error:
            row.error = error if error is report else DataError(f"{path}: {error}", error.reason)
            continue
        if report.clipped > CLIPPED:
            row.notes.append("clip overdriven (over 1% of its samples at full scale)")
        seconds = report.samples / SAMPLE_RATE
        examination.seconds += seconds
        examination.shortest = min(examination.shortest, seconds)
        examination.longest = max(examination.longest, seconds)


@contextmanager
def _clip_examiner(rules: Rules, workers: int | None) -> Iterator[Callable]:
    """A function: paths -> reports, in order. Headers are read by threads; --deep decodes in processes."""
    longest = float("inf") if rules.cut_long_clips else rules.window
    examine = partial(examine_clip, deep=rules.deep, channels=rules.channels, longest=longest)
    if workers == 0:
        yield partial(map, examine)
    elif rules.deep:
        # Spawned, since a fork of a process with threads may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield partial(pool.map, examine, chunksize=PATHS_PER_TASK)
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            yield lambda paths: chain.from_iterable(pool.map(lambda part: list(map(examine, part)), _in_parts(paths)))


def _in_parts(paths: Iterable[str]) -> list[list[str]]:
    paths = list(paths)
    return [paths[start : start + PATHS_PER_TASK] for start in range(0, len(paths), PATHS_PER_TASK)]


@contextmanager
def _dropped_rows(path: str | Path | None) -> Iterator[Callable[[Row], None]]:
    """A function that writes a row into `path`, which appears whole at the end, or not at all without rows."""
    if path is None:
        yield lambda row: None
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial_path, "w", encoding="utf-8") as file:

            def write(row: Row) -> None:
                text = row.source.decode("utf-8", "backslashreplace") if isinstance(row.source, bytes) else row.source
                entry = {"line": row.line, "id": row.id, "reason": row.error.reason, "message": str(row.error)}
                file.write(json.dumps(entry | {"text": text.strip()[:2000]}) + "\n")

            yield write
        if partial_path.stat().st_size:
            partial_path.replace(path)
        else:
            path.unlink(missing_ok=True)
    finally:
        partial_path.unlink(missing_ok=True)


class _Ids:
    """Finds ids that repeat: exactly and at once in evaluation files, only counted in training files, however long."""

    def __init__(self):
        self.first: dict[object, str] = {}
        self.hashes = array("q")

    def add(self, row: Row, exact: bool) -> str | None:
        """Where the id was before, or None; without `exact` always None."""
        key = json.dumps(row.id, sort_keys=True)
        if not exact:
            self.hashes.append(hash(key))
            return None
        if key in self.first:
            return self.first[key]
        self.first[key] = row.where
        return None

    def count_repeated(self) -> int:
        return len(self.hashes) - len(np.unique(np.frombuffer(self.hashes, dtype=np.int64))) if self.hashes else 0


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
    add("--workers", type=int, help="processes of --deep; default: one per core; 0: in this process")
    add("--dropped_file", help="write the bad rows here, as JSONL with the reasons")
    add("--keep_file", help="write the usable rows of a training file here, as they are")
    return parser.parse_args(argv)


def load_processor(name: str | None) -> Qwen2AudioProcessor | None:
    """The processor that counts tokens; None for `none`, and, with a word about it, where the default is not here."""
    if name == "none":
        return None
    from transformers import AutoProcessor, Qwen2AudioProcessor  # takes seconds, and --deep's workers need it not

    try:
        processor = AutoProcessor.from_pretrained(name or MODEL)
        if not isinstance(processor, Qwen2AudioProcessor):
            raise ValueError(f"it is a {type(processor).__name__}, not Qwen2-Audio's")
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
        file.writelines(line for number, line in read_lines(data_file) if number not in dropped)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        training = is_training_file(check_is_there(args.file))
        processor = load_processor(args.model_path)
        settings = dict(
            dropped_file=args.dropped_file, deep=args.deep, channels=args.audio_channels, workers=args.workers,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
        if training:
            settings["max_prompt_length"] = args.max_prompt_length
            examination = examine_training_file(args.file, args.prompt_style, processor, **settings)
        else:
            settings["audio_dir"] = args.audio_dir
            examination = examine_evaluation_file(args.file, args.prompt_style, processor, **settings)
        if args.keep_file and training:
            write_kept(examination.file, set(examination.dropped), args.keep_file)
    except BrokenExecutor:
        print("check.py: a worker died while decoding; --workers 0 decodes in this process", file=sys.stderr)
        return 2
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
