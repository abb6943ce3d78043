"""JSONL rows in AVQA's training format -> `datasets.Dataset`. Nothing here opens or decodes audio.

One line of the file, as the paper's repository has it (keys beyond these are ignored):

    {"question_text": "What happened in the video?", "multi_choice": ["motorboat", "Yacht consignment"], "answer": 1,
     "dataset_name": "AVQA", "audio_path": "wavs/-HG3Omg_89c_30.wav"}

Two degrees of strictness share their rules: `load_train_dataset` takes whatever a prompt can be made of, as the
original did; `check_choices` says what else a row should not be, for `check.py`, which drops such rows.

The columns are plain text and numbers: `datasets` would fill the keys of mixed message parts with None, and the chat
template would then miscount the audio, so messages are built late, by `prompt.build_messages`.
"""

import hashlib
import os
import tempfile
from collections.abc import Container, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from .prompt import DEFAULT_STYLE, build_question, build_solution, get_style
from .rows import DataError, get_field, read_lines

NO_ROWS = "holds no rows; data/README.md shows the format"
ROWS_PER_CHUNK = 10_000  # bounds the Python objects alive at once; the columns themselves are Arrow's, on disk

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),  # the user's text, audio excluded
        ("audio_path", pa.string()),  # absolute
        ("solution", pa.string()),  # <answer>...</answer>
        ("style", pa.string()),  # prompt style, for the format reward
        ("row", pa.int64()),  # line number in the data file, from 1, for messages
    ]
)


def load_train_dataset(data_file: str | Path, style: str = DEFAULT_STYLE, skip: Container[int] = ()) -> Dataset:
    """Read a training file in the format above: a row per question, in file order, with the columns of `SCHEMA`.

    Args:
        style: of every row's prompt.
        skip: line numbers to leave out unread, e.g. those that `check.examine_training_file` dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is not in the format, or there is none; names the file, the line and the remedy.
    """
    get_style(style)
    data_file = check_is_there(data_file)

    def rows() -> Iterator[dict]:
        for row in read_lines(data_file):
            try:
                if row.number not in skip:
                    yield to_row(row.parse(), row.number, style, data_file.parent)
            except DataError as error:
                raise ValueError(f"{data_file}, {row.where}: {error}") from error

    if not len(dataset := _to_dataset(rows())):
        raise ValueError(f"{data_file}: {NO_ROWS}")
    return dataset


def check_is_there(data_file: str | Path) -> Path:
    """`data_file` as a path, or a `FileNotFoundError` that says how to get one."""
    if not Path(data_file).is_file():
        remedy = "data/README.md says how to get AVQA and MMAU; `sh run_grpo.sh demo` makes data of its own"
        raise FileNotFoundError(f"{data_file}: no such data file; {remedy}")
    return Path(data_file)


def _to_dataset(rows: Iterator[dict]) -> Dataset:
    """Rows -> a data set in an unnamed file (in TMPDIR), read as needed: memory does not grow with their number."""
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with pa.ipc.new_stream(file, SCHEMA) as writer:
            while chunk := list(islice(rows, ROWS_PER_CHUNK)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=SCHEMA))
        file.flush()
        file.seek(0)
        # Given, since `datasets` would make one by copying the whole table.
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return Dataset(pa.ipc.open_stream(pa.memory_map(file.name)).read_all(), fingerprint=fingerprint)


def read_fields(record: dict, folder: Path) -> tuple[str, list, str, str]:
    """A parsed object's question, choices, right choice and absolute audio path (relative ones start from the working
    directory if the clip is there, else from `folder`); a `DataError` says what keeps it from being a row."""
    question = get_field(record, "question_text", str)
    choices = get_field(record, "multi_choice", list)
    answer = get_field(record, "answer", int)
    dataset_name = get_field(record, "dataset_name", str)
    audio_path = Path(get_field(record, "audio_path", str, filled=True))
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, (str, int, float)):
            raise DataError(f"`multi_choice` holds {choice!r:.80}; every choice must be a text", "choice is no text")
    if not 0 <= answer < len(choices):
        message = f"`answer` is {answer}, but the {len(choices)} choices are numbered from 0"
        raise DataError(message, "`answer` out of range")
    if dataset_name == "AVQA":  # its questions are about videos, of which the model gets the sound; as in the paper
        question = question.replace("video", "audio")
    if not audio_path.is_absolute() and not os.path.exists(audio_path):
        audio_path = folder / audio_path
    return question, choices, str(choices[answer]), str(audio_path.absolute())


def to_row(record: dict, number: int, style: str, folder: Path) -> dict:
    """One parsed object as a row of the data set; a `DataError` says what keeps it from being one."""
    question, choices, answer, audio_path = read_fields(record, folder)
    return {
        "prompt": build_question(question, choices, style),
        "audio_path": audio_path,
        "solution": build_solution(answer),
        "style": style,
        "row": number,
    }


def check_choices(question: str, choices: list, key: str) -> list[str]:
    """Hold a row to be trained on or asked against what `to_row` lets pass: a `DataError` if it is no question to be
    asked, else notes of what is only worth knowing. `key` is what its file calls the choices."""
    if not question.strip():
        raise DataError("the question is empty; remove the row", "question empty")
    for choice in choices:
        if not isinstance(choice, str):
            raise DataError(f"`{key}` holds {choice!r:.80}; every choice must be a text", "choice is no text")
    if len(choices) < 2:
        message = f"`{key}` has {len(choices)} entries, no choice at all; remove the row"
        raise DataError(message, "fewer than two choices")
    return ["choices with duplicates"] if len(set(choices)) < len(choices) else []
