"""Read the questions of a benchmark: MMAU (test-mini and test), MMAR, or AVQA, whose rows are also those of training.

    MMAU   id, audio_id, question, choices, answer (blank in the full test set), task, difficulty ...
    MMAR   id, audio_path, question, choices, answer, modality, category ...
    AVQA   see `dataset.py`; `question_relation` is used as the task

Each is a JSON list or JSONL. MMAU's test-mini had 13 versions in two releases: the paper's, and v05.15.25, with a third
of the questions revised. Scores on different releases are not comparable.
"""

import hashlib
import json
import os
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .dataset import check_choices, check_is_there, read_fields
from .rows import DataError, first_problems, get_field, read_numbered

ORIGINAL, REVISED, UNKNOWN = "original", "v05.15.25", "unrecognised"
# digest of the rows (`recognise_release`) -> release, and the day from which MMAU's repository had them
RELEASES = json.loads(Path(__file__).with_name("mmau_releases.json").read_text(encoding="utf-8"))
TITLES = {"mmau_mini": "MMAU test-mini", "mmau": "MMAU test", "mmar": "MMAR"}


@dataclass(frozen=True)
class Question:
    id: str
    record: dict  # the row with MMAU's keys
    audio_path: str

    @property
    def clip(self) -> str:
        """The clip's path as the row has it."""
        return self.record.get("audio_id") or self.record["audio_path"]


@dataclass(frozen=True)
class Benchmark:
    name: str  # for file names: mmau_mini, mmau, mmar, or mmau_SPLIT
    release: str  # see `recognise_release`
    digest: str  # of the questions in any order; only results with equal digests are comparable
    has_answers: bool
    questions: list[Question]
    audio_dir: Path  # where relative paths start
    faults: list[str]  # rows that `check_question` refuses; they are asked and scored nevertheless

    @property
    def title(self) -> str:
        title = TITLES.get(self.name, f"questions in MMAU's format ({self.name.removeprefix('mmau_')})")
        if self.name == "mmau_mini":  # questions of an unknown release may be any, for instance the demo's
            title = "questions in MMAU's format" if self.release == UNKNOWN else f"{title}, release {self.release}"
        return f"{title}, {len(self.questions)} questions ({self.digest})"

    @property
    def is_original(self) -> bool:
        """Whether these are the paper's questions."""
        return self.release.startswith(ORIGINAL)


def load_questions(
    path: str | Path, audio_dir: str | Path | None = None, skip: Container[int] = (), allow_outside: bool = True
) -> Benchmark:
    """Read a question file, without the row numbers in `skip`. Relative paths start at `audio_dir`, by default the
    file's folder. Raises as `to_benchmark`, a `FileNotFoundError`, and a `DataError` if a clip is outside this folder
    unless `allow_outside`."""
    records = read_numbered(path := check_is_there(path), skip)
    folder = Path(audio_dir or path.parent)
    benchmark = to_benchmark(list(records.values()), path, folder, list(records))
    for question in benchmark.questions if not allow_outside else ():
        check_inside(folder / question.clip, folder)
    return benchmark


def check_inside(clip: str | Path, folder: str | Path) -> None:
    """Raise a `DataError` if the path of a clip leads out of a folder, be it absolute or by `..`."""
    if not Path(os.path.abspath(clip)).is_relative_to(os.path.abspath(folder)):
        remedy = "move it, or pass --allow_outside where there is this flag"
        raise DataError(f"the clip {str(clip)!r:.200} is outside {folder}; {remedy}", "clip outside the data folder")


def to_benchmark(records: list[dict], source: Path, audio_dir: Path, numbers: Sequence[int] | None = None) -> Benchmark:
    """Parsed rows -> `Benchmark`. `numbers` are the rows' numbers in the file `source`, by default all from 1. Raises a
    `ValueError` with file and row if a row is not a question or repeats an id, or if only some answers are blank."""
    if not records:
        raise ValueError(f"{source}: holds no questions; data/README.md shows the format")
    questions, faults, blank = [], [], []
    ids: dict[str, int] = {}
    for number, record in zip(numbers or range(1, len(records) + 1), records, strict=True):
        try:
            questions.append(question := to_question(record, number, audio_dir, ids))
        except DataError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        try:
            check_question(question)
        except DataError as error:
            faults.append(f"row {number} ({question.id}): {error}")
        if not str(question.record.get("answer") or "").strip():
            blank.append(f"row {number}")
    if 0 < len(blank) < len(records):
        raise ValueError(f"{source}: fill in the blank answers, or blank all:\n  {first_problems(blank)}")
    records = [question.record for question in questions]
    digest = _digest(question.id + _content_hash(question.record) for question in questions)[:8]
    return Benchmark(_name(records), recognise_release(records), digest, not blank, questions, audio_dir, faults)


def _name(records: list[dict]) -> str:
    if any("modality" in record for record in records):
        return "mmar"
    split, *others = {str(record.get("split")) for record in records}
    if others or split in ("test-mini", "None") or not re.fullmatch(r"[\w-]{1,40}", split):
        return "mmau_mini"
    return "mmau" if split == "test" else f"mmau_{split}"


def to_question(record: dict, number: int, audio_dir: Path, ids: dict[str, int]) -> Question:
    """A parsed row -> `Question`; raises a `DataError`. `ids` maps earlier ids to row numbers, and gets this row's."""
    if "question_text" in record:  # a training row
        question, choices, answer, audio_path = read_fields(record, audio_dir)
        task, kind = str(record.get("question_relation", "all")), str(record.get("question_type", ""))
        record = {"id": str(record.get("id", number)), "audio_id": audio_path, "question": question}
        record |= {"choices": list(map(str, choices)), "answer": answer}
        record |= {"task": task, "difficulty": "", "sub-category": kind}
    get_field(record, "question", str, filled=True)
    get_field(record, "choices", list, filled=True)
    key = "audio_path" if "audio_path" in record and not record.get("audio_id") else "audio_id"
    clip = get_field(record, key, str, filled=True)
    id_ = str(record.get("id") or Path(clip).stem)  # early files of MMAU have no ids
    if id_ in ids and "id" not in record:  # two questions about one clip
        id_ = f"{id_}-{_content_hash(record)[:8]}"
    if ids.setdefault(id_, number) != number:
        raise DataError(f"the id {id_} is that of row {ids[id_]} too; make it unique", "id repeated")
    paths = (audio_dir / clip, audio_dir / Path(clip).name)  # clips may be in `audio_dir` itself
    return Question(id_, record, str(next(filter(os.path.isfile, paths), paths[0])))


def check_question(question: Question) -> list[str]:
    """Apply the rules that `to_question` does not; returns and raises as `dataset.check_choices`."""
    record = question.record
    notes = check_choices(record["question"], record["choices"], "choices")
    answer = record.get("answer")
    if answer not in record["choices"] and not (answer in (None, "") and record.get("split") == "test"):
        raise DataError(f"`answer` is {answer!r:.80}; write one of the choices", "`answer` not among the choices")
    return notes


def recognise_release(records: list[dict]) -> str:
    """Release and date of MMAU's test-mini, as in `RELEASES`, from its rows in any order; else `unrecognised`."""
    return RELEASES.get(_digest(map(_content_hash, records))[:16], UNKNOWN)


def _content_hash(record: dict) -> str:
    content = json.dumps([record.get(key) for key in ("question", "choices", "answer")])
    return hashlib.sha256(content.encode()).hexdigest()


def _digest(hashes: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()
