"""JSONL rows in AVQA's training format -> `datasets.Dataset`. Nothing here opens or decodes audio.

One line of the file, as the paper's repository has it (keys beyond these are ignored):

    {"question_text": "What happened in the video?", "multi_choice": ["motorboat", "Yacht consignment"], "answer": 1,
     "dataset_name": "AVQA", "audio_path": "wavs/-HG3Omg_89c_30.wav"}

Two degrees of strictness share their rules: `load_train_dataset` takes whatever a prompt can be made of, as the
original did; `check_row` says what else a row to be trained on should not be, for `check.py`, which drops such rows.

The columns are plain text and numbers: `datasets` would fill the keys of mixed message parts with None, and the chat
template would then miscount the audio, so messages are built late, by `prompt.build_messages`.
"""

import codecs
import hashlib
import json
import os
import tempfile
from collections.abc import Container, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from .audio import DataError
from .prompt import DEFAULT_STYLE, build_question, build_solution, check_style

ROWS_PER_CHUNK = 10_000  # bounds the Python objects alive at once; the columns themselves are Arrow's, on disk
MAX_LINE = 2**24  # bytes

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
    """Read a training file.

    Args:
        data_file: JSONL in the format above, UTF-8. Audio paths are absolute, or relative to the working directory,
            else to the file's own folder.
        style: prompt style of every row: `choice`, `answer` or `think`.
        skip: line numbers to leave out unread, e.g. those that `check.examine_training_file` dropped.

    Returns:
        One row per question, in file order, with the columns of `SCHEMA`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is not in the format, or there is none; names the file, the line and the remedy.
    """
    check_style(style)
    data_file = check_is_there(data_file)

    def rows() -> Iterator[dict]:
        for number, line in read_lines(data_file):
            if number in skip:
                continue
            try:
                yield to_row(parse_line(line), number, style, data_file.parent)
            except DataError as error:
                raise ValueError(f"{data_file}, line {number}: {error}") from error

    dataset = to_dataset(rows())
    if not len(dataset):
        raise ValueError(f"{data_file}: holds no rows; data/README.md shows the format")
    return dataset


def check_is_there(data_file: str | Path) -> Path:
    """`data_file` as a path, or a `FileNotFoundError` that says how to get one."""
    data_file = Path(data_file)
    if not data_file.is_file():
        raise FileNotFoundError(
            f"{data_file}: no such data file. data/README.md says how to prepare AVQA; "
            "`sh run_grpo.sh demo` trains on synthetic data without it."
        )
    return data_file


def to_dataset(rows: Iterable[dict]) -> Dataset:
    """Rows with the columns of `SCHEMA` -> a data set on disk, read as needed: memory does not grow with their number.

    The file is an unnamed one in the folder for temporary files (TMPDIR) and goes when the process ends.
    """
    rows = iter(rows)
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with pa.ipc.new_stream(file, SCHEMA) as writer:
            while chunk := list(islice(rows, ROWS_PER_CHUNK)):
                writer.write_table(pa.Table.from_pylist(chunk, schema=SCHEMA))
        file.flush()
        file.seek(0)
        # Given, since `datasets` would make one by copying the whole table.
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return Dataset(pa.ipc.open_stream(pa.memory_map(file.name)).read_all(), fingerprint=fingerprint)


def read_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) for every line of a JSONL file.

    Raises:
        ValueError: a line is blank, not UTF-8, not JSON, or not an object.
    """
    for number, line in read_lines(path):
        try:
            yield number, parse_line(line)
        except DataError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of a file; of a line over `MAX_LINE` bytes, only as much as shows that it is."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            yield number, line
            while len(line) > MAX_LINE and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE + 1)


def parse_line(line: bytes) -> dict:
    """One line as an object; a `DataError` says why it is none."""
    if not line.strip():
        raise DataError("blank line; remove it", "blank line")
    if len(line) > MAX_LINE:
        message = f"a line of more than {MAX_LINE >> 20} MiB; one JSON object per line is needed"
        raise DataError(message + ", as data/prepare_avqa.py makes of AVQA's own file", "line too long")
    if line.startswith(codecs.BOM_UTF8):
        raise DataError("starts with a byte-order mark; save the file as UTF-8 without one", "byte-order mark")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason}); save the file as UTF-8", "not UTF-8") from error
    except (ValueError, RecursionError) as error:  # among the ValueErrors: a number of more digits than Python takes
        raise DataError(f"not JSON ({error}); one whole JSON object per line is needed", "not JSON") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise DataError(f"a JSON {kind}, not an object with the keys of the format", "not a JSON object")
    return record


def to_row(record: dict, number: int, style: str, folder: Path) -> dict:
    """One parsed object as a row of the data set; a `DataError` says what keeps it from being one."""
    question = _field(record, "question_text", str)
    choices = _field(record, "multi_choice", list)
    answer = _field(record, "answer", int)
    dataset_name = _field(record, "dataset_name", str)
    audio_path = _field(record, "audio_path", str)
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, (str, int, float)):
            raise DataError(f"`multi_choice` holds {choice!r:.80}; every choice must be a text", "choice is no text")
        _check_text("multi_choice", choice)
    if not 0 <= answer < len(choices):
        message = f"`answer` is {answer}, but the {len(choices)} choices are numbered from 0"
        raise DataError(message, "`answer` out of range")
    if not audio_path:
        raise DataError("`audio_path` is empty", "`audio_path` empty")
    if dataset_name == "AVQA":  # its questions are about videos, of which the model gets the sound; as in the paper
        question = question.replace("video", "audio")
    return {
        "prompt": build_question(question, choices, style),
        "audio_path": resolve_audio_path(audio_path, folder),
        "solution": build_solution(choices[answer]),
        "style": style,
        "row": number,
    }


def check_row(record: dict) -> list[str]:
    """Hold a row against what `to_row` lets pass.

    Returns:
        What is only worth knowing, each in a few fixed words.

    Raises:
        DataError: it is no question to be asked.
    """
    return check_question(record["question_text"], record["multi_choice"], "multi_choice")


def check_question(question: str, choices: list, key: str) -> list[str]:
    """The rules that training and evaluation files share; `key` is what the file calls its choices. As `check_row`."""
    if not question.strip():
        raise DataError("the question is empty; remove the row", "question empty")
    for choice in choices:
        if not isinstance(choice, str):
            raise DataError(f"`{key}` holds {choice!r:.80}; every choice must be a text", "choice is no text")
    if len(choices) < 2:
        message = f"`{key}` has {len(choices)} entries, no choice at all; remove the row"
        raise DataError(message, "fewer than two choices")
    return ["choices with duplicates"] if len(set(choices)) < len(choices) else []


def _field(record: dict, key: str, kind: type):
    """`record[key]`, which must be there and of this JSON type (true and false are no numbers)."""
    if record.get(key) is None:
        what = "null" if key in record else "missing"
        raise DataError(f"`{key}` is {what}; data/README.md shows the format", f"`{key}` {what}")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        message = f"`{key}` is {value!r:.80}, of type {type(value).__name__}; it must be of type {kind.__name__}"
        raise DataError(message, f"`{key}` of the wrong type")
    return _check_text(key, value)


def _check_text(key: str, value):
    """`value` itself, unless it is a text that cannot be written down: JSON's \\ud800 is half a character."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"`{key}` holds half a surrogate pair, {value!r:.80}; mend the text"
            raise DataError(message, "broken text") from error
    return value


def resolve_audio_path(audio_path: str, folder: Path) -> str:
    """A clip's absolute path: as given, else below the working directory if it is there, else below `folder`."""
    path = Path(audio_path)
    if not path.is_absolute() and not os.path.exists(path):
        path = folder / path
    return str(path.absolute())
