"""Examine a training or evaluation file before a run: every row, every clip, every prompt's length.

    python src/dataset/check.py data/AVQA/train_qa.data
    python src/dataset/check.py data/MMAU/mmau-test-mini.json --deep

Rows are held against the rules of `dataset.py` and `questions.py`, clips against those of `audio.py` (headers; with
--deep all samples), prompts against those of `encode.py`. Each bad row is reported by file and line (in a JSON list by
its number), then all by reason. Rows are read, examined and forgotten a thousand at a time, so memory does not grow
with the file. Exit status: 0 if every row is usable, 1 if not, 2 if the file as a whole cannot be examined.
"""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import Namespace
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script, from src/dataset: its packages are those of src
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from command_line import ArgumentParser, at_least
from dataset.audio import CHANNELS, SAMPLE_RATE, DataError, examine_clip
from dataset.dataset import NO_ROWS, check_choices, check_is_there, to_row
from dataset.encode import MAX_PROMPT_LENGTH, check_prompt, count_heard, count_text_tokens
from dataset.progress import progress
from dataset.prompt import DEFAULT_STYLE, STYLES, build_question, get_style
from dataset.questions import UNKNOWN, check_clip_is_inside, check_question, recognise_release, to_question
from dataset.rows import SHOWN, Row, open_whole, read_lines, read_rows, starts_a_list

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MODEL = "Qwen/Qwen2-Audio-7B-Instruct"
ROWS_AT_ONCE = 1000
CLIPS_PER_TASK = 16
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
    lenient: bool = False  # of an evaluation file, only note rows that are asked although something is wrong with them
    deep: bool = False  # decode every clip, for NaN, silence and clipping
    audio_dir: str | Path | None = None  # what an evaluation file's clips start from; default: the file's own folder
    workers: int | None = None  # threads that read clips; default: THREADS
    dropped_file: Path | None = None  # gets the bad rows as JSONL (see `_describe`); removed if there are none
    progress: bool = False  # show a bar


@dataclass
class Examined:
    """One row on its way through the examination."""

    row: Row
    id: object = None
    prompt: str = ""
    audio_path: str = ""
    notes: list[str] = field(default_factory=list)  # what is only worth knowing
    error: DataError | None = None
    samples: int = 0  # of the clip
    tokens: int = 0  # of the prompt; 0 without a processor


Rule = Callable[[dict, int], tuple[str, str, list[str]]]  # row, its number -> prompt, audio path, notes; or a DataError


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
    longest_prompt: tuple[int, str] = (0, "")  # tokens, and where; 0 where they were not counted

    @property
    def usable(self) -> int:
        return self.rows - len(self.dropped)

    def enter(self, examined: Examined) -> None:
        """Count a row, usable or not."""
        self.rows += 1
        where = examined.row.where
        if error := examined.error:
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
        self.longest_prompt = max(self.longest_prompt, (examined.tokens, where), key=lambda prompt: prompt[0])

    def table(self) -> str:
        """What was found, a line for each reason: how many rows, and the first of them."""
        dropped = f"{len(self.dropped)} dropped ({len(self.dropped) / self.rows:.1%})"
        lines = [f"{self.file}: {self.kind}, {self.rows} rows, {self.usable} usable, {dropped}"]
        for title, counts in (([], self.reasons), (["  kept, but worth knowing:"], self.notes)):
            lines += title if counts else []
            width = max(map(len, counts), default=0)
            for reason, count in counts.most_common():
                lines.append(f"  {count:>8}  {reason:<{width}}  {self.examples.get(reason, ''):.120}".rstrip())
        if self.seconds:
            clips = f"clips of {self.shortest:.2f} to {self.longest:.2f} s"
            tokens = ", longest prompt {} tokens ({})".format(*self.longest_prompt) if self.longest_prompt[0] else ""
            lines.append(f"  {self.seconds / 3600:.2f} h of audio, {clips}{tokens}")
        return "\n".join(lines)

    def check_share(self, max_dropped: float) -> None:
        """Raise a `ValueError` with the table where more than this share of the rows was dropped, or no row is left."""
        if not self.usable:
            raise ValueError(f"no usable row is left\n{self.table()}")
        if len(self.dropped) > max_dropped * self.rows:
            raise ValueError(f"more than {max_dropped:.0%} of the rows are unusable (--max_dropped)\n{self.table()}")


def examine_training_file(data_file: str | Path, rules: Rules = Rules()) -> Examination:
    """Examine a training file; `load_train_dataset` then loads the others if it is told to skip `dropped`. Raises a
    `FileNotFoundError` if there is no such file, a `ValueError` if it holds no rows."""

    def rule(record: dict, number: int) -> tuple[str, str, list[str]]:
        row = to_row(record, number, rules.style, Path(data_file).parent)
        notes = check_choices(record["question_text"], record["multi_choice"], "multi_choice")
        return row["prompt"], row["audio_path"], notes

    return _examine(data_file, read_lines, rule, rules)


def examine_evaluation_file(data_file: str | Path, rules: Rules = Rules()) -> Examination:
    """Examine MMAU's JSON list or MMAR's JSONL, as `examine_training_file` does a training file; it must be JSON, too.
    Clips over the window are only noted, since evaluation cuts them as the paper did; prompts may be of any length."""
    audio_dir, records = Path(rules.audio_dir or Path(data_file).parent), []
    ids: dict[str, int] = {}

    def rule(record: dict, number: int) -> tuple[str, str, list[str]]:
        records.append(record)
        question = to_question(record, number, audio_dir, ids)
        try:
            notes = check_question(question)
            check_clip_is_inside(question, audio_dir)
        except DataError as error:
            if not rules.lenient:
                raise
            notes = [error.reason]
        prompt = build_question(question.record["question"], question.record["choices"], rules.style)
        return prompt, question.audio_path, notes

    rules = replace(rules, max_prompt_length=None, cut_long_clips=True)
    examination = _examine(data_file, read_rows, rule, rules)
    release = recognise_release(records)
    examination.kind = "evaluation file" if release == UNKNOWN else f"evaluation file, MMAU release {release}"
    return examination


def is_training_file(data_file: str | Path) -> bool:
    """Whether a file is in AVQA's training format (JSONL without `choices`), not in an evaluation's; a `ValueError` for
    AVQA's own annotations."""
    with open(data_file, "rb") as file:
        head = file.read(2**16)
    is_list = starts_a_list(data_file)
    if is_list and b'"multi_choice"' in head:
        raise ValueError(f"{data_file}: AVQA's own annotations; data/prepare_avqa.py makes a training file of them")
    return not (is_list or re.search(rb'"choices"\s*:', head))


# Examining


def _examine(data_file: str | Path, read: Callable[[Path], Iterator[Row]], rule: Rule, rules: Rules) -> Examination:
    """Enter all rows of a file into an examination, and write the bad ones."""
    get_style(rules.style)
    examination = Examination(check_is_there(data_file))
    total = sum(1 for _ in read(examination.file)) if rules.progress else None
    rows = iter(progress(read(examination.file), total=total, disable=not rules.progress, unit=" rows"))
    ids = array("q")  # hashed, to count those that repeat in however long a file
    bad_rows = open_whole(rules.dropped_file) if rules.dropped_file else nullcontext()
    with ThreadPool(rules.workers or THREADS) as pool, bad_rows as file:
        while chunk := [_read(row, rule) for row in islice(rows, ROWS_AT_ONCE)]:
            _examine_chunk([examined for examined in chunk if not examined.error], rules, pool)
            for examined in chunk:
                examination.enter(examined)
                if examined.error and file:
                    file.write(_describe(examined) + "\n")
                elif not examined.error and examined.id is not None:
                    ids.append(hash(str(examined.id)))
    if rules.dropped_file and not examination.dropped:
        rules.dropped_file.unlink()
    if not examination.rows:
        raise ValueError(f"{data_file}: {NO_ROWS}")
    if repeated := len(ids) - len(np.unique(ids)):
        examination.notes["id repeated"] = repeated
    return examination


def _read(row: Row, rule: Rule) -> Examined:
    examined = Examined(row)
    try:
        record = row.parse()
        examined.id = record.get("id")
        examined.prompt, examined.audio_path, examined.notes = rule(record, row.number)
    except DataError as error:
        examined.error = error
    return examined


def _describe(examined: Examined) -> str:
    """A bad row as JSON: `line`, `id`, `reason`, `message`, `text`."""
    assert examined.error is not None
    entry = {"line": examined.row.number, "id": examined.id, "reason": examined.error.reason}
    text = examined.row.text.decode("utf-8", "backslashreplace").strip()[:2000]
    return json.dumps(entry | {"message": str(examined.error), "text": text})


def _examine_chunk(chunk: list[Examined], rules: Rules, pool: ThreadPool) -> None:
    """Examine the prompts and clips of rows that were read; fills in what they lack."""
    window = count_heard(rules.processor)
    longest = float("inf") if rules.cut_long_clips else window
    listen = partial(examine_clip, deep=rules.deep, channels=rules.channels, longest=longest)
    paths = list(dict.fromkeys(examined.audio_path for examined in chunk))
    reports = dict(zip(paths, pool.map(listen, paths, CLIPS_PER_TASK), strict=True))
    prompts = [examined.prompt for examined in chunk]
    text_tokens = count_text_tokens(rules.processor, prompts) if rules.processor and chunk else [0] * len(chunk)
    for examined, tokens in zip(chunk, text_tokens, strict=True):
        report = reports[examined.audio_path]
        if isinstance(report, DataError):
            examined.error = report
            continue
        examined.samples = report.samples
        heard = min(report.samples, window) if rules.cut_long_clips else report.samples
        if heard < report.samples:
            examined.notes.append(f"clip over {window / SAMPLE_RATE:g} s, will be cut")
        if report.clipped > CLIPPED:
            examined.notes.append("clip overdriven (over 1% of its samples at full scale)")
        try:
            examined.tokens = check_prompt(examined.prompt, heard, tokens, rules.processor, rules.max_prompt_length)
        except DataError as error:
            examined.error = DataError(f"{examined.audio_path}: {error}", error.reason)


# Command line


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description="Examine a training or evaluation file: rows, clips, prompt lengths.")
    add = parser.add_argument
    add("file", help="training JSONL, MMAU's JSON or MMAR's JSONL")
    add("--model_path", help=f"whose processor counts the prompt's tokens; `none` does without; default: {MODEL}")
    add("--prompt_style", choices=STYLES, default=DEFAULT_STYLE, help="of the prompts that are counted")
    add("--max_prompt_length", type=at_least(1), default=MAX_PROMPT_LENGTH, help="tokens, with audio; training files'")
    add("--audio_dir", help="what an evaluation file's clips start from; default: the file's own folder")
    add("--audio_channels", choices=CHANNELS, default="first", help="channel(s) of a clip that --deep listens to")
    add("--deep", action="store_true", help="decode every clip: NaN, silence, overdriven, damaged in the middle")
    add("--workers", type=at_least(1), help="threads that read clips; default: one per core, at least 8")
    add("--dropped_file", type=Path, help="write the bad rows here, as JSONL with the reasons")
    add("--keep_file", type=Path, help="write the usable rows of a training file here, as they are")
    return parser.parse_args(argv)


def load_processor(name: str | None) -> ProcessorMixin | None:
    """The processor that counts tokens; None for `none`, and, with a word about it, where the default is not here."""
    if name == "none":
        return None
    from transformers import AutoProcessor  # takes seconds, which `none` need not wait

    try:
        processor = AutoProcessor.from_pretrained(name or MODEL, trust_remote_code=False)
        count_heard(processor)  # one that takes no audio cannot say it
        return processor
    except (OSError, ValueError, AttributeError) as error:
        if name:
            why = str(error).partition("\n")[0]
            raise ValueError(f"{name}: no processor can be loaded from it ({why})") from error
        print(f"prompt lengths are not checked, {MODEL} is not here: --model_path names a folder", file=sys.stderr)
        return None


def write_kept(data_file: Path, dropped: Container[int], keep_file: Path) -> None:
    """Copy the lines of a training file that were not dropped, byte for byte; a `ValueError` if `keep_file` lies in
    another folder than relative audio paths start from, or is the file itself."""
    if keep_file.resolve().parent != data_file.resolve().parent or keep_file.resolve() == data_file.resolve():
        raise ValueError(f"{keep_file}: relative audio paths start from {data_file.parent}: choose another name there")
    with open(keep_file, "wb") as file:
        file.writelines(row.text for row in read_lines(data_file) if row.number not in dropped)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        training = is_training_file(check_is_there(args.file))
        rules = Rules(
            args.prompt_style, load_processor(args.model_path), args.max_prompt_length, args.audio_channels,
            deep=args.deep, audio_dir=args.audio_dir, workers=args.workers, dropped_file=args.dropped_file,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
        examination = (examine_training_file if training else examine_evaluation_file)(args.file, rules)
        if args.keep_file and training:
            write_kept(examination.file, set(examination.dropped), args.keep_file)
    except (ValueError, OSError) as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    more = len(examination.dropped) - len(examination.shown)
    rest = [f"... and {more} more (--dropped_file writes all)"] if more else []
    print(*examination.shown, *rest, examination.table(), sep="\n")
    return 1 if examination.dropped else 0


if __name__ == "__main__":
    sys.exit(main())
