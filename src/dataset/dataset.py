"""JSONL rows in AVQA's training format -> `datasets.Dataset`. Nothing here opens or decodes audio.

One line of the file, as the paper's repository has it (keys beyond these are ignored):

    {"question_text": "What happened in the video?", "multi_choice": ["motorboat", "Yacht consignment"], "answer": 1,
     "dataset_name": "AVQA", "audio_path": "wavs/-HG3Omg_89c_30.wav"}

The columns are plain text and numbers: `datasets` would fill the keys of mixed message parts with None, and the chat
template would then miscount the audio, so messages are built late, by `prompt.build_messages`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from .prompt import DEFAULT_STYLE, build_question, build_solution, check_style

ROWS_PER_CHUNK = 10_000  # bounds the Python objects alive at once; the columns themselves are Arrow's

SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),  # the user's text, audio excluded
        ("audio_path", pa.string()),  # absolute
        ("solution", pa.string()),  # <answer>...</answer>
        ("style", pa.string()),  # prompt style, for the format reward
        ("row", pa.int64()),  # line number in the data file, from 1, for messages
    ]
)


def load_train_dataset(data_file: str | Path, style: str = DEFAULT_STYLE) -> Dataset:
    """Read a training file.

    Args:
        data_file: JSONL in the format above, UTF-8. Audio paths are absolute, or relative to the working directory,
            else to the file's own folder.
        style: prompt style of every row: `choice`, `answer` or `think`.

    Returns:
        One row per question, in file order, with the columns of `SCHEMA`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is not in the format, or there is none; names the file, the line and the remedy.
    """
    check_style(style)
    data_file = Path(data_file)
    if not data_file.is_file():
        raise FileNotFoundError(
            f"{data_file}: no such data file. data/README.md says how to prepare AVQA; "
            "`sh run_grpo.sh demo` trains on synthetic data without it."
        )
    chunks, rows = [], []
    for number, record in read_rows(data_file):
        try:
            rows.append(_to_row(record, number, style, data_file.parent))
        except ValueError as error:
            raise ValueError(f"{data_file}, line {number}: {error}") from error
        if len(rows) == ROWS_PER_CHUNK:
            chunks.append(pa.Table.from_pylist(rows, schema=SCHEMA))
            rows = []
    if rows:
        chunks.append(pa.Table.from_pylist(rows, schema=SCHEMA))
    if not chunks:
        raise ValueError(f"{data_file}: holds no rows; data/README.md shows the format")
    return Dataset(pa.concat_tables(chunks))


def read_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) for every line of a JSONL file.

    Raises:
        ValueError: a line is blank, not UTF-8, not JSON, or not an object.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                raise ValueError(f"{where}: blank line; remove it")
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}); one whole JSON object per line is needed") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object with the keys of the format")
            yield number, record


def _to_row(record: dict, number: int, style: str, folder: Path) -> dict:
    """One parsed object as a row of the data set; a `ValueError` says what is wrong with it."""
    question = _field(record, "question_text", str)
    choices = _field(record, "multi_choice", list)
    answer = _field(record, "answer", int)
    dataset_name = _field(record, "dataset_name", str)
    audio_path = _field(record, "audio_path", str)
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, (str, int, float)):
            raise ValueError(f"`multi_choice` holds {choice!r}; every choice must be a text")
    if not 0 <= answer < len(choices):
        raise ValueError(f"`answer` is {answer}, but the {len(choices)} choices are numbered from 0")
    if not audio_path:
        raise ValueError("`audio_path` is empty")
    if dataset_name == "AVQA":  # its questions are about videos, of which the model gets the sound; lower case, as in the paper
        question = question.replace("video", "audio")
    return {
        "prompt": build_question(question, choices, style),
        "audio_path": resolve_audio_path(audio_path, folder),
        "solution": build_solution(choices[answer]),
        "style": style,
        "row": number,
    }


def _field(record: dict, key: str, kind: type):
    """`record[key]`, which must be there and of this JSON type (true and false are no numbers)."""
    if record.get(key) is None:
        raise ValueError(f"`{key}` is {'null' if key in record else 'missing'}; data/README.md shows the format")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"`{key}` is {value!r:.80}, of type {type(value).__name__}; it must be of type {kind.__name__}")
    return value


def resolve_audio_path(audio_path: str, folder: Path) -> str:
    """Absolute path of a clip: as given if absolute, else below the working directory if it is there, else below `folder`."""
    path = Path(audio_path)
    if not path.is_absolute() and not path.exists():
        path = folder / path
    return str(path.absolute())
