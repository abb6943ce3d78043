"""Check the rows, clips and prompt lengths of a training or evaluation file before a run.

    python src/run/check.py data/AVQA/train_qa.data
    python src/run/check.py data/MMAU/mmau-test-mini.json --deep

Counts bad rows by reason, and shows the first of each. Clips are checked by their headers, with --deep by their
samples. Exit status: 0 if every row is usable, 1 if not, 2 if the file is unusable.
"""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.audio import CHANNELS, SAMPLE_RATE, count_samples, decode
from dataset.dataset import NO_ROWS, check_choices, check_is_there, to_row
from dataset.encode import MAX_PROMPT_LENGTH, window_samples
from dataset.prompt import DEFAULT_STYLE, STYLES, build_question
from dataset.questions import check_inside, check_question, to_question
from dataset.rows import DataError, Row, read_lines, read_rows, starts_a_list
from evaluation.files import open_whole
from evaluation.lengths import check_prompt, count_text_tokens
from utils.flags import at_least

MODEL = "Qwen/Qwen2-Audio-7B-Instruct"


@dataclass(frozen=True)
class Rules:
    """What makes a row usable, and how to check it."""

    style: str = DEFAULT_STYLE
    processor: Any = None  # the model's; without one, neither prompt lengths nor special tokens are checked
    max_prompt_length: int | None = MAX_PROMPT_LENGTH  # tokens, audio included; None: any, and long clips are cut
    channels: str = "first"  # see `load_audio`
    lenient: bool = False  # keep rows of an evaluation file that can be asked but break a rule, with a note
    deep: bool = False  # decode every clip: NaN, silence, damage
    audio_dir: str | Path | None = None  # folder of an evaluation file's clips; default: the file's own
    dropped_file: Path | None = None  # receives the bad rows as JSONL
    progress: bool = False  # show a bar if stderr is a terminal


@dataclass
class Examined:
    """A row with what was found so far."""

    row: Row
    prompt: str = ""
    audio_path: str = ""
    notes: list[str] = field(default_factory=list)
    error: DataError | None = None
    samples: int = 0  # of the clip, at 16 kHz, after a cut
    tokens: int = 0  # of the prompt; 0 without a processor


@dataclass
class Examination:
    """What was found in a file. Of usable rows only counts are kept."""

    file: Path
    rows: int = 0
    dropped: list[int] = field(default_factory=list)  # row numbers (line numbers in JSONL)
    reasons: Counter = field(default_factory=Counter)  # reason -> dropped rows
    notes: Counter = field(default_factory=Counter)  # note -> usable rows
    examples: dict[str, str] = field(default_factory=dict)  # reason or note -> its first row
    longest: float = 0.0  # clip, in s
    longest_prompt: int = 0  # tokens; 0 without a processor

    @property
    def usable(self) -> int:
        return self.rows - len(self.dropped)

    def enter(self, examined: Examined) -> None:
        """Count a row."""
        self.rows += 1
        where = examined.row.where
        if error := examined.error:
            self.dropped.append(examined.row.number)
            self.reasons[error.reason] += 1
            self.examples.setdefault(error.reason, f"{where}: {error}")
            return
        for note in examined.notes:
            self.notes[note] += 1
            self.examples.setdefault(note, where)
        self.longest = max(self.longest, examined.samples / SAMPLE_RATE)
        self.longest_prompt = max(self.longest_prompt, examined.tokens)

    def table(self) -> str:
        """Counts by reason of the dropped rows and by note of the usable ones, each with its first row."""
        dropped = f"{len(self.dropped)} dropped ({len(self.dropped) / self.rows:.1%})"
        lines = [f"{self.file}: {self.rows} rows, {self.usable} usable, {dropped}"]
        for kept, counts in (("", self.reasons), ("kept: ", self.notes)):
            for reason, count in counts.most_common():
                lines.append(f"  {count:>8}  {kept}{reason}  {self.examples[reason]:.500}")
        prompt = f"longest prompt {self.longest_prompt} tokens, " if self.longest_prompt else ""
        return "\n".join([*lines, f"  {prompt}longest clip {self.longest:.2f} s"])

    def check_share(self, max_dropped: float) -> None:
        """Raise a `ValueError` with the table if a larger share of the rows was dropped, or no row is usable."""
        if not self.usable or len(self.dropped) > max_dropped * self.rows:
            found = f"{len(self.dropped)} of {self.rows} rows are unusable"
            raise ValueError(f"{found}; correct them, or raise --max_dropped {max_dropped:g}\n{self.table()}")


def examine_training_file(data_file: str | Path, rules: Rules = Rules()) -> Examination:
    """Check a training file. Raises a `FileNotFoundError`, or a `ValueError` if the file has no rows."""

    def rule(record: dict, number: int) -> tuple[str, str, list[str]]:
        row = to_row(record, number, rules.style, Path(data_file).parent)
        notes = check_choices(record["question_text"], record["multi_choice"], "multi_choice")
        return row["prompt"], row["audio_path"], notes

    return _examine(data_file, read_lines, rule, rules)


def examine_evaluation_file(data_file: str | Path, rules: Rules = Rules()) -> Examination:
    """As `examine_training_file`, but as in evaluation prompts may have any length, and long clips are cut."""
    audio_dir = Path(rules.audio_dir or Path(data_file).parent)
    ids: dict[str, int] = {}

    def rule(record: dict, number: int) -> tuple[str, str, list[str]]:
        question = to_question(record, number, audio_dir, ids)
        try:
            notes = check_question(question)
            check_inside(audio_dir / question.clip, audio_dir)
        except DataError as error:
            if not rules.lenient:
                raise
            notes = [error.reason]
        prompt = build_question(question.record["question"], question.record["choices"], rules.style)
        return prompt, question.audio_path, notes

    return _examine(data_file, read_rows, rule, replace(rules, max_prompt_length=None))


def is_training_file(data_file: str | Path) -> bool:
    """Whether a file holds training rows: JSONL without `choices`."""
    with open(data_file, "rb") as file:
        return b'"choices"' not in file.read(2**16) and not starts_a_list(data_file)


def _examine(data_file: str | Path, read: Callable[[Path], Iterator[Row]], rule: Callable, rules: Rules) -> Examination:
    """`rule` maps a parsed row and its number to prompt, audio path and notes, or raises a `DataError`."""
    examination = Examination(check_is_there(data_file))
    rows = iter(tqdm(read(examination.file), disable=None if rules.progress else True, unit=" rows"))
    bad_rows = open_whole(rules.dropped_file) if rules.dropped_file else nullcontext()
    with ThreadPool(max(8, os.cpu_count() or 1)) as pool, bad_rows as file:
        while chunk := [_read(row, rule) for row in islice(rows, 1000)]:  # bounds the memory
            pool.map(lambda examined: examine_clip(examined, rules), chunk, chunksize=16)
            _check_prompts([examined for examined in chunk if not examined.error], rules)
            for examined in chunk:
                examination.enter(examined)
                if (error := examined.error) and file:
                    text = examined.row.text.decode("utf-8", "backslashreplace").strip()[:2000]
                    entry = {"line": examined.row.number, "reason": error.reason, "message": str(error), "text": text}
                    file.write(json.dumps(entry) + "\n")
    if not examination.rows:
        raise ValueError(f"{data_file}: {NO_ROWS}")
    return examination


def _read(row: Row, rule: Callable) -> Examined:
    try:
        return Examined(row, *rule(row.parse(), row.number))
    except DataError as error:
        return Examined(row, error=error)


def examine_clip(examined: Examined, rules: Rules) -> None:
    """Set the clip's samples, notes and error. Runs in threads, since headers wait for the disk, and decoding releases
    the GIL."""
    if examined.error:
        return
    window = window_samples(rules.processor)
    try:
        examined.samples = count_samples(examined.audio_path)
        if examined.samples > window and rules.max_prompt_length is None:
            examined.samples = window
            examined.notes.append(f"clip over {window / SAMPLE_RATE:g} s, will be cut")
        if rules.deep and examined.samples <= window:  # longer ones are refused anyway
            decode(examined.audio_path, rules.channels)
    except DataError as error:
        examined.error = error


def _check_prompts(chunk: list[Examined], rules: Rules) -> None:
    """Set the prompts' tokens, or the error of a prompt or clip with a wrong length."""
    prompts = [examined.prompt for examined in chunk]
    text_tokens = count_text_tokens(rules.processor, prompts) if rules.processor and chunk else [0] * len(chunk)
    for examined, prompt, tokens in zip(chunk, prompts, text_tokens, strict=True):
        try:
            limit = rules.max_prompt_length
            examined.tokens = check_prompt(prompt, examined.samples, tokens, rules.processor, limit)
        except DataError as error:
            examined.error = DataError(f"{examined.audio_path}: {error}", error.reason)


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("file", help="training JSONL, MMAU's JSON or MMAR's JSONL")
    add("--model_path", help=f"its processor counts tokens; none: no count; default: {MODEL} if the cache has it")
    add("--prompt_style", dest="style", choices=STYLES, default=DEFAULT_STYLE, help="of the prompts that are counted")
    add("--max_prompt_length", type=at_least(1), default=MAX_PROMPT_LENGTH, help="tokens, audio included, in training")
    add("--audio_dir", help="folder of an evaluation file's clips; default: the file's own")
    add("--audio_channels", dest="channels", choices=CHANNELS, default="first", help="that --deep examines")
    add("--deep", action="store_true", help="decode every clip: NaN, silence, damaged in the middle")
    add("--dropped_file", type=Path, help="write the bad rows here, as JSONL with the reasons")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = vars(parse_args(argv))
    file, cached = args.pop("file"), try_to_load_from_cache(MODEL, "preprocessor_config.json")  # asks no hub
    model = args.pop("model_path") or (Path(str(cached)).parent if cached else "none")
    try:
        examine = examine_training_file if is_training_file(check_is_there(file)) else examine_evaluation_file
        if model == "none":
            print("prompt lengths are not checked; --model_path names a model that counts tokens", file=sys.stderr)
        else:
            from model.qwen2_audio import load_processor  # takes seconds

            args["processor"] = load_processor(model)
        examination = examine(file, Rules(**args, progress=True))
    except (ValueError, OSError) as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    print(examination.table())
    return 1 if examination.dropped else 0


if __name__ == "__main__":
    sys.exit(main())
