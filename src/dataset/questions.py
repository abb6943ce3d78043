"""A file of questions to ask a model: read, checked, recognised. Knows MMAU (test-mini and test, both releases), MMAR,
and AVQA, whose rows are those to train on.

    MMAU   id, audio_id, question, choices, answer (blank in the full test set), task, difficulty ...
    MMAR   id, audio_path, question, choices, answer, modality, category ...
    AVQA   see `dataset.py`; `question_relation` serves as the task

Each is a JSON list or JSONL.

There are two releases of MMAU's test-mini, the original of the paper and the revised v05.15.25, in which about a
quarter of the questions differ; scores of one do not compare with those of the other. `mmau_v05.15.25.txt` beside this
file has a line for each question of the revised release: 6 hex digits of the id's hash, 4 of the question's. Its
authors keep mending single questions, so a file counts as revised when nearly all of its questions are those.

As in `dataset.py`, `to_question` takes whatever can be asked, and `check_question` says what else a row should not be.
Leaves out the clips (only their paths are made here) and the scoring (`evaluation/mmau.py`).
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .dataset import check_choices, read_fields
from .rows import DataError, get_field, read_records

REVISED, ORIGINAL, UNKNOWN = "v05.15.25", "original", "unrecognised"
REVISED_QUESTIONS = Path(__file__).with_name(f"mmau_{REVISED}.txt")
REVISED_SHARE = 0.95  # of the known questions that must be the revised ones; in the original release about 0.75 are
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

    name: str  # for file names: mmau_mini, mmau, mmar
    release: str  # of MMAU: original or v05.15.25; unrecognised for anything else
    digest: str  # of the questions, whatever their order; results compare only where it is equal
    has_answers: bool
    questions: list[Question]

    @property
    def title(self) -> str:
        title = TITLES[self.name]
        if self.name == "mmau_mini" and self.release == UNKNOWN:  # the demo's, say
            title = "questions in MMAU's format"
        elif self.name != "mmar":
            title += f", release {self.release}"
        return f"{title}, {len(self.questions)} questions ({self.digest})"


def load_questions(path: str | Path, audio_dir: str | Path | None = None) -> Benchmark:
    """Read a question file.

    Args:
        path: MMAU's, MMAR's or AVQA's.
        audio_dir: what the clips' paths start from; the file's own folder by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, has no rows, or one that is no question or repeats an id; names file and row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such question file; data/README.md says how to get MMAU's")
    return to_benchmark(read_records(path), path, Path(audio_dir or path.parent))


def to_benchmark(records: list[dict], source: Path, audio_dir: Path) -> Benchmark:
    """Rows already read -> `Benchmark`; `source` is named in messages. Raises as `load_questions`."""
    if not records:
        raise ValueError(f"{source}: holds no questions")
    questions, ids = [], {}
    for number, record in enumerate(records, start=1):
        try:
            questions.append(to_question(record, number, audio_dir, ids))
        except DataError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    records = [question.record for question in questions]  # AVQA's are others now
    if any("modality" in record for record in records):
        name = "mmar"
    else:
        name = "mmau" if all(record.get("split") == "test" for record in records) else "mmau_mini"
    hashes = sorted(question.id + _content_hash(question.record) for question in questions)
    return Benchmark(
        name=name,
        release=recognise_release(records),
        digest=_hash(" ".join(hashes))[:8],
        has_answers=all(str(record.get("answer") or "").strip() for record in records),
        questions=questions,
    )


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
    clip = get_field(record, _clip_key(record), str, filled=True)
    id_ = _id(record)
    if id_ in ids and "id" not in record:  # two questions about one clip, in a file without ids
        id_ = f"{id_}-{_content_hash(record)[:8]}"
    if id_ in ids:
        raise DataError(f"the id {id_} is that of row {ids[id_]} too; make it unique", "id repeated")
    ids[id_] = number
    # As the row has it below `audio_dir`, or right there without its folder.
    paths = (audio_dir / clip, audio_dir / Path(clip).name)
    return Question(id_, record, str(next(filter(os.path.isfile, paths), paths[0])))


def check_question(question: Question, audio_dir: Path) -> list[str]:
    """Hold a question against what `to_question` lets pass; returns and raises as `dataset.check_row`."""
    record = question.record
    notes = check_choices(record["question"], record["choices"], "choices")
    answer = record.get("answer")
    if answer not in record["choices"] and not (answer in (None, "") and record.get("split") == "test"):
        message = f"`answer` is {answer!r:.80}, which is none of the choices; mend the row"
        raise DataError(message, "`answer` not among the choices")
    key, folder = _clip_key(record), os.path.abspath(audio_dir)
    if os.path.commonpath([folder, os.path.normpath(os.path.join(folder, record[key]))]) != folder:
        message = f"`{key}` {record[key]!r:.200} leads out of the data folder {folder}; move the clip into it"
        raise DataError(message, "clip outside the data folder")
    return notes


def recognise_release(records: list[dict]) -> str:
    """Which release of MMAU's test-mini the rows are from: `original`, `v05.15.25`, or `unrecognised`."""
    revised = _revised_questions()
    known = [(hashed, record) for record in records if (hashed := _hash(_id(record))[:6]) in revised]
    if not known:
        return UNKNOWN
    equal = sum(revised[hashed] == _content_hash(record)[:4] for hashed, record in known)
    return REVISED if equal >= REVISED_SHARE * len(known) else ORIGINAL


def release_line(record: dict) -> str:
    """A row's line in `mmau_v05.15.25.txt`."""
    return _hash(_id(record))[:6] + _content_hash(record)[:4]


@cache
def _revised_questions() -> dict[str, str]:
    return {line[:6]: line[6:] for line in REVISED_QUESTIONS.read_text(encoding="ascii").split()}


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


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
