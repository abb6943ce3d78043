"""JSONL rows in AVQA's training format -> `datasets.Dataset`. Audio is not opened.

One line of the file, as in the paper's repository (other keys are ignored):

    {"question_text": "What happened in the video?", "multi_choice": ["motorboat", "Yacht consignment"], "answer": 1,
     "dataset_name": "AVQA", "audio_path": "wavs/-HG3Omg_89c_30.wav"}

`load_train_dataset` accepts every row that gives a prompt, as the original did; `check_choices` applies stricter rules.
"""

import hashlib
import os
import tempfile
from collections.abc import Container, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from .prompt import DEFAULT_STYLE, build_question, build_solution
from .rows import DataError, get_field, read_lines

NO_ROWS = "holds no rows; data/README.md shows the format"
ROWS_PER_CHUNK = 10_000  # rows held as Python objects at a time

# Prompts are plain text. In messages `datasets` would fill missing keys with None, and the chat template would then
# miscount the audio.
COLUMNS = {
    "prompt": pa.string(),  # the user's text, audio excluded
    "audio_path": pa.string(),  # absolute
    "solution": pa.string(),  # <answer>...</answer>
    "style": pa.string(),  # prompt style, for the format reward
    "row": pa.int64(),  # line number in the data file, from 1, for messages
}
SCHEMA = pa.schema(COLUMNS)


def load_train_dataset(data_file: str | Path, style: str = DEFAULT_STYLE, skip: Container[int] = ()) -> Dataset:
    """Read a training file into the columns of `SCHEMA`, in file order, without the line numbers in `skip`. The columns
    are in an unnamed file in TMPDIR, so memory does not grow with the rows. Raises a `FileNotFoundError`, or a
    `ValueError` with file, line and remedy if a row is malformed or there are none."""
    rows = _read_rows(check_is_there(data_file), style, skip)
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with pa.ipc.new_stream(file, SCHEMA) as writer:
            while chunk := list(islice(rows, ROWS_PER_CHUNK)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=SCHEMA))
        file.flush()
        file.seek(0)
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]  # `datasets` would copy the whole table
        dataset = Dataset(pa.ipc.open_stream(pa.memory_map(file.name)).read_all(), fingerprint=fingerprint)
    if not len(dataset):
        raise ValueError(f"{data_file}: {NO_ROWS}")
    return dataset


def _read_rows(data_file: Path, style: str, skip: Container[int]) -> Iterator[dict]:
    for row in read_lines(data_file):
        try:
            if row.number not in skip:
                yield to_row(row.parse(), row.number, style, data_file.parent)
        except DataError as error:
            raise ValueError(f"{data_file}, {row.where}: {error}") from error


def check_is_there(data_file: str | Path) -> Path:
    """`data_file` as a path; raises a `FileNotFoundError` that says how to get one."""
    if not Path(data_file).is_file():
        remedy = "get AVQA and MMAU as in data/README.md, or make the demo's data with `sh run_grpo.sh demo`"
        raise FileNotFoundError(f"{data_file}: no such data file; {remedy}")
    return Path(data_file)


def to_row(record: dict, number: int, style: str, folder: Path) -> dict:
    """A parsed row -> a row of the data set; raises a `DataError` if it is not in the format."""
    question, choices, answer, audio_path = read_fields(record, folder)
    prompt, solution = build_question(question, choices, style), build_solution(answer)
    return {"prompt": prompt, "audio_path": audio_path, "solution": solution, "style": style, "row": number}


def read_fields(record: dict, folder: Path) -> tuple[str, list, str, str]:
    """A parsed row -> question, choices, right choice, absolute audio path; raises a `DataError`. Relative paths start
    at the working directory if the clip is there, else at `folder`."""
    question = get_field(record, "question_text", str)
    choices = get_field(record, "multi_choice", list)
    answer = get_field(record, "answer", int)
    dataset_name = get_field(record, "dataset_name", str)
    audio_path = Path(get_field(record, "audio_path", str, filled=True))
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, (str, int, float)):
            raise DataError(f"`multi_choice` holds {choice!r:.80}; write every choice as text", "choice is no text")
    if not 0 <= answer < len(choices):
        raise DataError(f"`answer` is {answer}; number the {len(choices)} choices from 0", "`answer` out of range")
    if dataset_name == "AVQA":  # as in the paper: its questions are about videos, but the model gets only the sound
        question = question.replace("video", "audio")
    if not audio_path.is_absolute() and not os.path.exists(audio_path):
        audio_path = folder / audio_path
    return question, choices, str(choices[answer]), str(audio_path.absolute())


def check_choices(question: str, choices: list, key: str) -> list[str]:
    """Apply the rules that `to_row` does not; `key` is the file's key of the choices. Returns notes on a usable row,
    and raises a `DataError` if the question should not be asked."""
    if not question.strip():
        raise DataError("the question is empty; remove the row", "question empty")
    for choice in choices:
        if not isinstance(choice, str):
            raise DataError(f"`{key}` holds {choice!r:.80}; write every choice as text", "choice is no text")
    if len(choices) < 2:
        raise DataError(f"`{key}` has {len(choices)} entries; remove the row", "fewer than two choices")
    return ["choices with duplicates"] if len(set(choices)) < len(choices) else []
