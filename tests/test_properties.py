"""Properties of what reads text that nobody controls: no input raises anything but the documented error, and a megabyte of
the most awkward text takes as long as a megabyte of any other."""

import json
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import write_tone
from dataset.dataset import load_train_dataset
from dataset.prompt import STYLES, extract_answer, matches_format
from dataset.rows import DataError, Row, read_records
from evaluation.mmau import string_match
from run.check import Examined, Rules, examine_clip, examine_training_file

TAGS = ["<answer>", "</answer>", "<think>", "</think>", "<", ">", "/", " ", "\n", "\r", "\t", "a", "狗", "\u2028", "\0"]
COMPLETION = st.one_of(st.text(), st.lists(st.sampled_from(TAGS)).map("".join))
MEGABYTE = 2**20
ADVERSARIAL = {
    "letters": "a" * MEGABYTE,
    "words": "ab " * (MEGABYTE // 3),
    "spaces": " " * MEGABYTE,
    "lines": "\n" * MEGABYTE,
    "open answers": "<answer>" * (MEGABYTE // 8),
    "closed answers": "</answer>" * (MEGABYTE // 9),
    "answers across lines": "<answer>\n" * (MEGABYTE // 9),
    "open thoughts": "<think>" * (MEGABYTE // 7),
    "closed thoughts": "</think>" * (MEGABYTE // 8),
    "thoughts and spaces": "<think></think>" + " " * MEGABYTE,
    "thoughts, spaces, again": "<think>" + ("</think>" + " " * 1000) * (MEGABYTE // 1008),
    "almost the end": "<think>" + "</think> <answer" * (MEGABYTE // 16) + "</answer>",
    "almost tags": "<answer" * (MEGABYTE // 7),
    "combining marks": "a" + "\u0301" * (MEGABYTE // 2),
    "surrogates": "\ud800" * MEGABYTE,
}


def seconds_for(function, text) -> float:
    start = time.perf_counter()
    function(text)
    return time.perf_counter() - start


# The JSONL reader

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["question_text", "multi_choice", "answer", "dataset_name", "audio_path", "id"])
RECORD = st.dictionaries(KEYS, JSON | st.integers(-2, 3) | st.lists(st.text(max_size=3), max_size=4) | st.just("AVQA"))
LINE = st.binary() | JSON.map(json.dumps).map(str.encode) | RECORD.map(json.dumps).map(str.encode)


@settings(deadline=None, max_examples=150)
@given(LINE)
def test_a_line_is_an_object_or_a_reason(line):
    try:
        assert isinstance(Row(1, line).parse(), dict)
    except DataError as error:
        assert error.reason != "unusable" and str(error)


@settings(deadline=None, max_examples=100)
@given(st.lists(LINE, max_size=6), st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
def test_a_file_is_rows_or_an_error_with_its_line(tmp_path_factory, lines, end):
    path = tmp_path_factory.getbasetemp() / "property.jsonl"
    path.write_bytes(end.join(lines))
    for read in (lambda: read_records(path), lambda: load_train_dataset(path)):
        try:
            read()
        except ValueError as error:
            assert str(path) in str(error)
    content = path.read_bytes()
    try:
        examination = examine_training_file(path)
        assert examination.rows == content.count(b"\n") + (not content.endswith(b"\n"))
        if examination.usable:
            assert len(load_train_dataset(path, skip=set(examination.dropped))) == examination.usable
        assert "unusable" not in examination.reasons, "every error has a reason of its own"
        assert examination.table().encode("utf-8")
    except ValueError as error:
        assert not content and str(path) in str(error)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_megabyte_in_a_line_is_read_in_time(tmp_path, name):
    row = {
        "question_text": ADVERSARIAL[name],
        "multi_choice": ["a", "b"],
        "answer": 0,
        "dataset_name": "AVQA",
        "audio_path": "a",
    }
    path = tmp_path / "train.jsonl"
    path.write_bytes(json.dumps(row).encode() + b"\n" + ADVERSARIAL[name].replace("\n", " ").encode("utf-8", "replace"))
    assert seconds_for(examine_training_file, path) < 5


# Clips


@pytest.mark.parametrize("format", ["WAV", "FLAC", "MP3", "OGG"])
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=20),
    end=st.integers(0, 9),
)
def test_a_damaged_clip_is_usable_or_has_a_reason(tmp_path, format, changes, end):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    if not whole.exists():
        write_tone(whole, 0.3, format=format)
    content = bytearray(whole.read_bytes())
    for place, value in changes:
        content[place] = value
    damaged.write_bytes(content[: len(content) * (end + 1) // 10])
    for deep in (False, True):
        examined = Examined(Row(1, b""), audio_path=str(damaged))
        examine_clip(examined, Rules(deep=deep))
        assert examined.samples > 0 if examined.error is None else examined.error.reason != "unusable"


# Answers


@settings(deadline=None, max_examples=300)
@given(COMPLETION)
def test_extract_answer_is_the_originals_expression(completion):
    match = re.search(r"<answer>(.*?)</answer>", completion)
    assert extract_answer(completion) == (match.group(1) if match else completion).strip()


@settings(deadline=None, max_examples=300)
@given(COMPLETION)
def test_matches_format_is_the_originals_expression(completion):
    assert matches_format(completion, "answer") == bool(re.fullmatch(r"<answer>.*?</answer>", completion, re.DOTALL))
    think = re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", completion, re.DOTALL)
    assert matches_format(completion, "think") == bool(think)
    assert matches_format(completion, "choice")


@settings(deadline=None, max_examples=200)
@given(COMPLETION, COMPLETION, st.lists(COMPLETION, max_size=5))
def test_string_match_never_fails(answer, prediction, choices):
    match = string_match(answer, prediction, choices)
    words = re.findall(r"\w", answer)
    assert match in (True, False) and not (match and not prediction)
    if words:
        assert string_match(answer, answer, [answer, *choices]) or any(set(choice) & set(answer) for choice in choices)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_megabyte_of_anything_is_graded_in_time(name):
    """Far below what anything quadratic would take: 10^12 steps."""
    text = ADVERSARIAL[name]
    for wrapped in (text, f"<answer>{text}</answer>", f"<think>{text}</think><answer>{text}</answer>"):
        assert seconds_for(extract_answer, wrapped) < 3
        for style in STYLES:
            assert seconds_for(lambda completion, style=style: matches_format(completion, style), wrapped) < 3
        assert (
            seconds_for(lambda prediction: string_match("a dog", prediction, ["a dog", "a cat", prediction]), wrapped)
            < 5
        )
