"""A benchmark's question file: read, checked, recognised. Knows MMAU (test-mini and test, both releases) and MMAR.

    MMAU   a JSON list      id, audio_id, question, choices, answer (blank in the full test set), task, difficulty ...
    MMAR   JSONL or a list  id, audio_path, question, choices, answer, modality, category ...

There are two releases of MMAU's test-mini, the original of the paper and the revised v05.15.25, in which about a
quarter of the questions differ; scores of one do not compare with those of the other. `mmau_v05.15.25.txt` beside this
file has a line for each question of the revised release: 6 hex digits of the id's hash, 4 of the question's. Its
authors keep mending single questions, so a file counts as revised when nearly all of its questions are those.

Leaves out the clips (only their paths are made here) and the scoring (`evaluation/mmau.py`).
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from .dataset import read_rows, resolve_audio_path

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


def load_benchmark(data_file: str | Path, audio_dir: str | Path | None = None) -> Benchmark:
    """Read a question file.

    Args:
        data_file: MMAU's JSON list or MMAR's JSONL.
        audio_dir: what the clips' paths start from; the file's own folder by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no rows, or a row lacks a key, has no choices or repeats an id; names file and row.
    """
    data_file = Path(data_file)
    if not data_file.is_file():
        raise FileNotFoundError(f"{data_file}: no such question file; data/README.md says how to get MMAU's")
    return to_benchmark(read_records(data_file), data_file, Path(audio_dir or data_file.parent))


def load_questions(path: str | Path) -> Benchmark:
    """A question file for evaluation: MMAU's or MMAR's, or AVQA's JSONL, whose `question_relation` serves as the task.

    Raises:
        FileNotFoundError, ValueError: see `load_benchmark`.
    """
    path = Path(path)
    try:
        first = next(read_rows(path))[1]
    except (OSError, ValueError, StopIteration):  # not JSONL; what else may be wrong with it, the other reader says
        first = {}
    if "question_text" not in first:
        return load_benchmark(path)
    records = []
    for number, row in read_rows(path):
        try:
            replaced = row["question_text"].replace("video", "audio") if row.get("dataset_name") == "AVQA" else None
            records.append(
                {
                    "id": str(row.get("id", number)),
                    "audio_id": resolve_audio_path(row["audio_path"], path.parent),
                    "question": replaced or row["question_text"],
                    "choices": [str(choice) for choice in row["multi_choice"]],
                    "answer": str(row["multi_choice"][row["answer"]]),
                    "task": str(row.get("question_relation", "all")),
                    "difficulty": "",
                    "sub-category": str(row.get("question_type", "")),
                }
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}; src/dataset/check.py says more") from error
    return to_benchmark(records, path, path.parent)


def read_records(path: str | Path) -> list[dict]:
    """Rows of a JSON list or of a JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither, or a row is not an object; names the file and the row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:  # of UTF-8 and of JSON alike
        raise ValueError(f"{path}: neither a JSON list nor one JSON object per line, in UTF-8 ({error})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: a JSON {type(row).__name__}, not an object")
    return rows


def to_benchmark(records: list[dict], source: Path, audio_dir: Path) -> Benchmark:
    """Rows already read -> `Benchmark`; `source` is named in messages. Raises as `load_benchmark`."""
    if not records:
        raise ValueError(f"{source}: holds no questions")
    questions, seen = [], {}
    for number, record in enumerate(records, start=1):
        try:
            question = _to_question(record, audio_dir)
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        if question.id in seen and "id" not in record:  # two questions about one clip, in a file without ids
            question = replace(question, id=f"{question.id}-{_content_hash(record)[:8]}")
        if question.id in seen:
            raise ValueError(
                f"{source}, row {number}: the id {question.id} is that of row {seen[question.id]}; make it unique"
            )
        seen[question.id] = number
        questions.append(question)
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


def _to_question(record: dict, audio_dir: Path) -> Question:
    for key in ("question", "choices"):
        if not record.get(key):
            raise ValueError(f"`{key}` is missing or empty")
    if not isinstance(record["choices"], list):
        raise ValueError(f"`choices` is {record['choices']!r:.80}, not a list")
    clip = record.get("audio_id") or record.get("audio_path")
    if not clip:
        raise ValueError("neither `audio_id` (MMAU) nor `audio_path` (MMAR) names its clip")
    # As the row has it below `audio_dir`, or right there without its folder.
    paths = (audio_dir / clip, audio_dir / Path(clip).name)
    return Question(_id(record), record, str(next((path for path in paths if path.is_file()), paths[0])))


def _id(record: dict) -> str:
    """The row's id; early files of MMAU have none, and name the clip after it."""
    return str(record.get("id") or Path(str(record.get("audio_id") or record.get("audio_path"))).stem)


def _content_hash(record: dict) -> str:
    return _hash(json.dumps([record.get(key) for key in ("question", "choices", "answer")]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
