"""A file of questions to ask a model: read, checked, recognised. Knows MMAU (test-mini and test), MMAR, and AVQA, whose
rows are those to train on.

    MMAU   id, audio_id, question, choices, answer (blank in the full test set), task, difficulty ...
    MMAR   id, audio_path, question, choices, answer, modality, category ...
    AVQA   see `dataset.py`; `question_relation` serves as the task

Each is a JSON list or JSONL.

MMAU's repository has had 13 contents of its test-mini, in two releases: the original of the paper, and v05.15.25, in
which a third of the questions differ. `RELEASES` knows each by its digest; scores of two releases never compare.

As in `dataset.py`, `to_question` takes whatever can be asked, and `check_question` says what else a row should not be.
Leaves out the clips (only their paths are made here) and the scoring (`evaluation/mmau.py`).
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .dataset import check_choices, check_is_there, read_fields
from .rows import DataError, first_problems, get_field, read_numbered

ORIGINAL, DRAFT, REVISED, UNKNOWN = "original", "v05.15.25-draft", "v05.15.25", "unrecognised"
RELEASES = {  # a content's digest, see `recognise_release` -> its release, and the day from which the repository had it
    "71638ebc1207b1f2": f"{ORIGINAL} of 2024-10-23",
    "a7c2b43aaa293eb2": f"{ORIGINAL} of 2024-12-09",
    "d8369588bb762bd9": f"{ORIGINAL} of 2025-01-28",  # when the paper was written
    "a320eb2ab7aeb808": f"{ORIGINAL} of 2025-03-25",
    "292e8dc999c158e8": f"{DRAFT} of 2025-05-15",  # 147 answers of this one are not among their choices
    "06882b6ce588b3ab": f"{DRAFT} of 2025-05-16",  # 146 of this one
    "b528bdae07d3675b": f"{DRAFT} of 2025-05-18",
    "200fd7b4b64b9d2c": f"{DRAFT} of 2025-05-19",
    "8b0953d4251b0808": f"{REVISED} of 2025-05-22",
    "e0a2743835be9cf5": f"{REVISED} of 2025-05-30",
    "36995be9dbeff5ad": f"{REVISED} of 2025-06-23",
    "45c5d3794c224b4c": f"{REVISED} of 2025-06-23",
    "5f6fa51f13737d8c": f"{REVISED} of 2025-08-09",
}
# Their rows, by the first 6 digits of their hashes, a line for those that the same contents hold: which ones do, in the
# order of `RELEASES`, then the rows.
CONTENTS = Path(__file__).with_name("mmau_contents.txt")
TITLES = {"mmau_mini": "MMAU test-mini", "mmau": "MMAU test", "mmar": "MMAR"}


@dataclass(frozen=True)
class Question:
    """One row."""

    id: str
    record: dict  # the row as it is in the file
    audio_path: str


@dataclass(frozen=True)
class Benchmark:
    """A question file."""

    name: str  # for file names: mmau_mini, mmau, mmar; mmau_SPLIT for a split that MMAU does not have
    release: str  # as `recognise_release` says it
    digest: str  # of the questions, whatever their order; results compare only where it is equal
    has_answers: bool
    questions: list[Question]
    faults: list[str]  # what `check_question` finds in rows; they are asked and scored all the same

    @property
    def title(self) -> str:
        title = TITLES.get(self.name, f"questions in MMAU's format ({self.name.removeprefix('mmau_')})")
        if self.name == "mmau_mini":  # without a known question it is the demo's, say
            title = "questions in MMAU's format" if self.release == UNKNOWN else f"{title}, release {self.release}"
        return f"{title}, {len(self.questions)} questions ({self.digest})"

    @property
    def is_original(self) -> bool:
        """Whether these are the paper's questions, with which its scores compare."""
        return self.release.startswith(ORIGINAL)


def load_questions(path: str | Path, audio_dir: str | Path | None = None, skip: Container[int] = ()) -> Benchmark:
    """Read a question file.

    Args:
        path: MMAU's, MMAR's or AVQA's.
        audio_dir: what the clips' paths start from; the file's own folder by default.
        skip: numbers of rows to leave out unread, e.g. those that `check.examine_evaluation_file` dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, has no rows, or one that is no question or repeats an id, or blank answers among
            others; names file and row.
    """
    path = check_is_there(path)
    records = read_numbered(path, skip)
    return to_benchmark(list(records.values()), path, Path(audio_dir or path.parent), list(records))


def to_benchmark(records: list[dict], source: Path, audio_dir: Path, numbers: Sequence[int] | None = None) -> Benchmark:
    """Rows already read -> `Benchmark`; `source`, and the rows' `numbers` in it (by default all from 1), are named in
    messages. Raises as `load_questions`."""
    numbers = numbers or range(1, len(records) + 1)
    if not records:
        raise ValueError(f"{source}: holds no questions")
    questions, faults = [], []
    ids: dict[str, int] = {}
    for number, record in zip(numbers, records, strict=True):
        try:
            questions.append(to_question(record, number, audio_dir, ids))
        except DataError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        try:
            check_question(questions[-1])
        except DataError as error:
            faults.append(f"row {number} ({questions[-1].id}): {error}")
    records = [question.record for question in questions]  # AVQA's are others now
    rows = zip(numbers, records, strict=True)
    blank = [f"row {number}" for number, record in rows if not str(record.get("answer") or "").strip()]
    if 0 < len(blank) < len(records):
        message = f"{source}: the answer of {len(blank)} rows is blank, and of others not, so there is no score; "
        raise ValueError(message + f"fill them in, or leave all out for a submission:\n  {first_problems(blank)}")
    return Benchmark(
        name=_name(records),
        release=recognise_release(records),
        digest=_digest(question.id + _content_hash(question.record) for question in questions)[:8],
        has_answers=not blank,
        questions=questions,
        faults=faults,
    )


def _name(records: list[dict]) -> str:
    if any("modality" in record for record in records):
        return "mmar"
    split, *others = {str(record.get("split")) for record in records}
    if others or split in ("test-mini", "None") or not re.fullmatch(r"[\w-]{1,40}", split):
        return "mmau_mini"
    return "mmau" if split == "test" else f"mmau_{split}"


def to_question(record: dict, number: int, audio_dir: Path, ids: dict[str, int]) -> Question:
    """A row as a question.

    Args:
        number: of the row, from 1.
        audio_dir: what the clip's path starts from.
        ids: of the questions before it, and their rows' numbers; gets this one's.

    Raises:
        DataError: it cannot be asked, or has another's id.
    """
    if "question_text" in record:
        record = _from_avqa(record, number, audio_dir)
    get_field(record, "question", str, filled=True)
    get_field(record, "choices", list, filled=True)
    for key in (key for key, value in record.items() if isinstance(value, str)):
        get_field(record, key, str)  # one that can be written down
    clip = get_field(record, _clip_key(record), str, filled=True)
    id_ = _id(record)
    if id_ in ids and "id" not in record:  # two questions about one clip, in a file without ids
        id_ = f"{id_}-{_content_hash(record)[:8]}"
    if ids.setdefault(id_, number) != number:
        raise DataError(f"the id {id_} is that of row {ids[id_]} too; make it unique", "id repeated")
    # As the row has it below `audio_dir`, or right there without its folder.
    paths = (audio_dir / clip, audio_dir / Path(clip).name)
    return Question(id_, record, str(next(filter(os.path.isfile, paths), paths[0])))


def check_question(question: Question) -> list[str]:
    """Hold a question against what `to_question` lets pass; returns and raises as `dataset.check_choices`."""
    record = question.record
    notes = check_choices(record["question"], record["choices"], "choices")
    answer = record.get("answer")
    if answer not in record["choices"] and not (answer in (None, "") and record.get("split") == "test"):
        message = f"`answer` is {answer!r:.80}, which is none of the choices; mend the row"
        raise DataError(message, "`answer` not among the choices")
    return notes


def check_clip_is_inside(question: Question, audio_dir: Path) -> None:
    """Raise a `DataError` for a clip outside of the data folder, as somebody else's file may name it."""
    key, folder = _clip_key(question.record), Path(os.path.abspath(audio_dir))
    if not Path(os.path.normpath(folder / question.record[key])).is_relative_to(folder):
        message = f"`{key}` {question.record[key]!r:.200} leads out of the data folder {folder}; move the clip into it"
        raise DataError(message, "clip outside the data folder")


def recognise_release(records: list[dict]) -> str:
    """Which content of MMAU's test-mini the rows are, whatever their order.

    Returns:
        Release and date, as in `RELEASES`; else `unrecognised`, for 1000 rows with the nearest content and how many
        questions are not in it.
    """
    hashes = [_content_hash(record) for record in records]
    if release := RELEASES.get(_digest(hashes)[:16]):
        return release
    differing, nearest = find_nearest(hashes)
    if len(records) == 1000 > differing:
        return f"{UNKNOWN} ({differing} of 1000 questions not those of {nearest})"
    return UNKNOWN  # no test-mini at all


def find_nearest(hashes: list[str]) -> tuple[int, str]:
    """How many rows of these hashes are not in the known content that has the most of them, and its release."""
    contents: list[Counter[str]] = [Counter() for _ in RELEASES]
    for line in CONTENTS.read_text(encoding="ascii").splitlines():
        places, prefixes = line.split()
        for content, place in zip(contents, places, strict=True):
            content.update(re.findall("." * 6, prefixes) if place == "1" else ())
    rows = Counter(hashed[:6] for hashed in hashes)
    return min(zip(((rows - content).total() for content in contents), RELEASES.values(), strict=True))


def _from_avqa(record: dict, number: int, folder: Path) -> dict:
    """A row to train on with MMAU's keys."""
    question, choices, answer, audio_path = read_fields(record, folder)
    return {
        "id": str(record.get("id", number)),
        "audio_id": audio_path,
        "question": question,
        "choices": [str(choice) for choice in choices],
        "answer": answer,
        "task": str(record.get("question_relation", "all")),
        "difficulty": "",
        "sub-category": str(record.get("question_type", "")),
    }


def _clip_key(record: dict) -> str:
    return "audio_path" if "audio_path" in record and not record.get("audio_id") else "audio_id"


def _id(record: dict) -> str:
    """The row's id; early files of MMAU have none, and name the clip after it."""
    return str(record.get("id") or Path(str(record.get("audio_id") or record.get("audio_path"))).stem)


def _content_hash(record: dict) -> str:
    return _hash(json.dumps([record.get(key) for key in ("question", "choices", "answer")]))


def _digest(hashes: Iterable[str]) -> str:
    """Of rows in any order."""
    return _hash(" ".join(sorted(hashes)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
