"""rows.py: JSON lists and JSONL, with or without a byte-order mark; broken files named with their line; whole files."""

import json

import pytest

from dataset.rows import (
    DataError,
    first_problems,
    get_field,
    read_json,
    read_lines,
    read_records,
    read_rows,
)
from evaluation.files import open_whole, write_whole

RECORDS = [{"id": 1, "text": "two\u2028lines"}, {"id": 2}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order mark"])
def test_a_list_and_lines_are_the_same_rows(tmp_path, mark):
    path = tmp_path / "rows"
    path.write_text(mark + json.dumps(RECORDS, indent=1), encoding="utf-8")
    assert read_records(path) == RECORDS
    assert [(row.where, row.parse()) for row in read_rows(path)] == [("row 1", RECORDS[0]), ("row 2", RECORDS[1])]
    path.write_text(mark + LINES, encoding="utf-8")
    assert read_records(path) == RECORDS
    assert [(row.where, row.parse()) for row in read_rows(path)] == [("line 1", RECORDS[0]), ("line 2", RECORDS[1])]
    assert [row.parse() for row in read_lines(path)] == RECORDS


def test_records_skip_blank_lines(tmp_path):
    path = tmp_path / "rows"
    path.write_text(LINES.replace("\n", "\n\n"), encoding="utf-8")
    assert read_records(path) == RECORDS
    with pytest.raises(DataError) as error:
        list(read_rows(path))[1].parse()
    assert error.value.reason == "blank line"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": 1},\n{"id" 2}]', "not JSON .*line 2"),
        (b'[{"id": 1}\n{"id": 2}]', "not JSON .*line 2"),
        (b"[]\n x", "not JSON .*line 2"),
        (b'[\n\n"caf\xe9"]', "not UTF-8 .*position 7"),
        (b"[" * 100_000, ": not JSON"),
        (b'{"id": 1}\n{"id": ' + b'{"a":' * 100_000, "line 2: not JSON"),
        (b'{"id": 1}\n{"id": "\\ud800"}', "line 2: "),
        (b'{"id": 1}\n{"id": ' + b"1" * 5000 + b"}", "line 2: not JSON"),
        (b'[{"id": 1}, 5]', "row 2: a JSON int"),
        (b'{"id": 1}\n{"id"', "line 2: not JSON"),
        (b'{"id": 1}\n\n\xe9', "line 3: not UTF-8"),
    ],
)
def test_what_is_broken_is_named_with_its_file_and_place(tmp_path, content, message):
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rows.*" + message):
        read_records(path)


def test_no_file(tmp_path):
    for read in (read_records, lambda path: read_json(path, "")):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


def test_fields():
    record = {"text": "a", "empty": "", "null": None, "flag": True, "list": ["a", 5]}
    assert get_field(record, "text", str) == "a" and get_field(record, "list", list) == ["a", 5]
    assert get_field(record, "empty", str) == ""
    for key, kind, reason in (
        ("empty", str, "`empty` empty"),
        ("null", str, "`null` null"),
        ("none", str, "`none` missing"),
        ("flag", int, "`flag` of the wrong type"),
        ("text", list, "`text` of the wrong type"),
    ):
        with pytest.raises(DataError) as error:
            get_field(record, key, kind, filled=True)
        assert error.value.reason == reason


def test_first_problems():
    assert first_problems(["a", "b"], 2) == "a\n  b"
    assert first_problems(map(str, range(25)), 2) == "0\n  1\n  ... and 23 more"
    assert len(first_problems("x" * 25).split("\n")) == 21


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(RuntimeError), open_whole(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
