"""Rows in files: JSONL and JSON lists are read here, and files written that are there whole or not at all. What the
keys of a row mean is the business of `dataset.py` and `questions.py`.

Text is UTF-8; a byte-order mark, as some editors write it, does no harm.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

MAX_LINE = 2**24  # bytes of a line
MAX_FILE = 2**30  # bytes of a file that is read as a whole; MMAU's 9000 questions have 5 million
MAX_DEPTH = 50  # lists and objects within one another, far below what Python's own functions fail over
SHOWN = 20  # problems listed in one message


class DataError(ValueError):
    """A row or clip that cannot be used: the message says why and what to do, `reason` why in a few fixed words."""

    def __init__(self, message: str, reason: str = "unusable"):
        super().__init__(message)
        self.reason = reason


class Row(NamedTuple):
    """One row of a file, not parsed yet."""

    number: int  # from 1
    text: bytes
    unit: str = "line"  # what is counted: `line` in JSONL, `row` in a JSON list

    @property
    def where(self) -> str:
        return f"{self.unit} {self.number}"

    def parse(self) -> dict:
        """The row as an object; a `DataError` says why it is none."""
        if not self.text.strip():
            raise DataError("blank line; remove it", "blank line")
        if len(self.text) > MAX_LINE:
            message = f"a line of more than {MAX_LINE >> 20} MiB; one JSON object per line is needed"
            raise DataError(message + ", as data/prepare_avqa.py makes of AVQA's own file", "line too long")
        record = _parse(self.text, "one whole JSON object per line is needed")
        if not isinstance(record, dict):
            message = f"a JSON {type(record).__name__}, not an object with the keys of the format"
            raise DataError(message, "not a JSON object")
        return record


def read_lines(path: str | Path) -> Iterator[Row]:
    """The lines of a JSONL file, one at a time; of one over `MAX_LINE` bytes, only as much as shows that it is."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), start=1):
            yield Row(number, line)
            while len(line) > MAX_LINE and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE + 1)


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file that is a JSON list, read as a whole and with the errors of `read_json`, or JSONL."""
    if not starts_a_list(path):
        yield from read_lines(path)
        return
    for number, value in enumerate(read_json(path, "a list or one object per line is needed"), start=1):
        yield Row(number, json.dumps(value).encode(), "row")


def read_records(path: str | Path) -> list[dict]:
    """All that `read_rows` reads but blank lines; a `ValueError` names file and row of what is no object."""
    return list(read_numbered(path).values())


def read_numbered(path: str | Path, skip: Container[int] = ()) -> dict[int, dict]:
    """As `read_records`, by the rows' numbers; those in `skip` are left out unread."""
    records = {}
    for row in read_rows(path):
        try:
            if row.text.strip() and row.number not in skip:
                records[row.number] = row.parse()
        except DataError as error:
            raise ValueError(f"{path}, {row.where}: {error}") from error
    return records


def starts_a_list(path: str | Path) -> bool:
    """Whether the first character of a file is `[`."""
    with open(path, "rb") as file:
        head = file.read(2**16)
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def read_json(path: str | Path, remedy: str):
    """The value of a JSON file; for one that is too large or not JSON in UTF-8, a `ValueError` with file, line and
    `remedy`."""
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"{path}: more than {MAX_FILE >> 30} GiB; {remedy}")
    try:
        return _parse(data, remedy)
    except DataError as error:
        line = getattr(cause := error.__cause__, "lineno", None)  # of a JSONDecodeError
        if isinstance(cause, UnicodeDecodeError):
            line = data.count(b"\n", 0, cause.start) + 1
        raise ValueError(f"{path}{f', line {line}' if line else ''}: {error}") from error


def _parse(text: bytes, remedy: str):
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason}); save the file as UTF-8", "not UTF-8") from error
    except (ValueError, RecursionError) as error:  # among the ValueErrors: a number of more digits than Python takes
        raise DataError(f"not JSON ({error}); {remedy}", "not JSON") from error
    if is_deeper(value, MAX_DEPTH):
        raise DataError(f"lists or objects more than {MAX_DEPTH} deep in one another; {remedy}", "too deep")
    return value


def is_deeper(value, depth: int) -> bool:
    """Whether a value has more than `depth` lists and objects within one another; goes down level by level, without
    recursion.

    >>> is_deeper({"a": [1]}, 2), is_deeper({"a": [1]}, 1)
    (False, True)
    """
    level = [value]
    for _ in range(depth + 1):
        level = [held for held in level if isinstance(held, list | dict)]
        inner = (held.values() if isinstance(held, dict) else held for held in level)
        if not level:
            return False
        level = [item for items in inner for item in items]
    return True


def get_field(record: dict, key: str, kind: type, filled: bool = False):
    """`record[key]`; a `DataError` unless it is there, of this JSON type (true and false are no numbers), not empty if
    `filled`, and of text that can be written down."""
    value = record.get(key)
    if value is None or (filled and value == kind()):
        what = "empty" if value is not None else "null" if key in record else "missing"
        raise DataError(f"`{key}` is {what}; data/README.md shows the format", f"`{key}` {what}")
    if not isinstance(value, kind) or isinstance(value, bool):
        found = f"`{key}` is {value!r:.80}, of type {type(value).__name__}"
        message = f"{found}; it must be of type {kind.__name__}; data/README.md shows the format"
        raise DataError(message, f"`{key}` of the wrong type")
    for text in value if isinstance(value, list) else (value,):
        try:
            if isinstance(text, str):
                text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON's \ud800 is half a character
            message = f"`{key}` holds half a surrogate pair, {text!r:.80}; mend the text"
            raise DataError(message, "broken text") from error
    return value


def first_problems(problems: Iterable[str], shown: int = SHOWN) -> str:
    """The first of many problems, a line each, and how many more there are.

    >>> print("2 rows:\\n  " + first_problems(["row 1: no clip", "row 7: no question"], shown=1))
    2 rows:
      row 1: no clip
      ... and 1 more
    """
    lines = list(problems)
    more = [f"... and {len(lines) - shown} more"] if len(lines) > shown else []
    return "\n  ".join(lines[:shown] + more)


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex digits; raises as `open`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    with open_whole(path) as file:
        file.write(text)


@contextmanager
def open_whole(path: Path) -> Iterator[TextIO]:
    """A file to write into, which gets its name when all is written; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write to a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
