"""Read rows from JSONL files and JSON lists, in UTF-8 with or without a byte-order mark."""

import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class DataError(ValueError):
    """An unusable row or clip: the message says what is wrong and what to do, `reason` names the kind of error."""

    def __init__(self, message: str, reason: str = "unusable"):
        super().__init__(message)
        self.reason = reason


class Row(NamedTuple):
    """One row of a file, not yet parsed."""

    number: int  # from 1
    text: bytes
    where: str = ""  # `line 7` of JSONL, `row 7` of a JSON list

    def parse(self) -> dict:
        """The row as an object; raises a `DataError` if it is not one."""
        if not self.text.strip():
            raise DataError("blank line; remove it", "blank line")
        record = _parse(self.text, "write one whole JSON object per line")
        if not isinstance(record, dict):
            raise DataError(f"a JSON {type(record).__name__}; write a JSON object", "not a JSON object")
        try:
            json.dumps(record, ensure_ascii=False).encode()  # fails for JSON's \ud800, which is half a character
        except UnicodeEncodeError as error:
            raise DataError("holds half a surrogate pair (as \\ud800); correct the text", "broken text") from error
        return record


def read_lines(path: str | Path) -> Iterator[Row]:
    """The lines of a JSONL file, one at a time."""
    with open(path, "rb") as file:
        yield from (Row(number, line, f"line {number}") for number, line in enumerate(file, start=1))


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a JSONL file, or of a JSON list, which is read as a whole and raises as `read_json`."""
    if not starts_a_list(path):
        return read_lines(path)
    values = enumerate(read_json(path, "write a list, or one object per line"), start=1)
    return (Row(number, json.dumps(value).encode(), f"row {number}") for number, value in values)


def read_records(path: str | Path) -> list[dict]:
    """The objects in a file, without blank lines; raises a `ValueError` with file and row if one is not an object."""
    return list(read_numbered(path).values())


def read_numbered(path: str | Path, skip: Container[int] = ()) -> dict[int, dict]:
    """As `read_records`, but by row number. Rows in `skip` are omitted, and not parsed."""
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
        return file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def read_json(path: str | Path, remedy: str):
    """The value of a JSON file; raises a `ValueError` with file, place and `remedy` if it is not JSON in UTF-8."""
    try:
        return _parse(Path(path).read_bytes(), remedy)
    except DataError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(text: bytes, remedy: str):
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError also for a number with more digits than Python allows
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
        raise DataError(f"{reason} ({error}); {remedy}", reason) from error


def get_field(record: dict, key: str, kind: type, filled: bool = False):
    """`record[key]`; raises a `DataError` if it is missing, null, of another type, or empty although `filled`."""
    value = record.get(key)
    if value is None or (filled and value == kind()):
        what = "empty" if value is not None else "null" if key in record else "missing"
        raise DataError(f"`{key}` is {what}; data/README.md shows the format", f"`{key}` {what}")
    if not isinstance(value, kind) or isinstance(value, bool):  # JSON's true and false are not numbers
        raise DataError(f"`{key}` is {value!r:.80}; write a {kind.__name__}", f"`{key}` of the wrong type")
    return value


def first_problems(problems: Iterable[str], shown: int = 20) -> str:
    """The first problems, one per line, and the number of the others."""
    lines = list(problems)
    return "\n  ".join(lines[:shown] + [f"... and {len(lines) - shown} more"] * (len(lines) > shown))
