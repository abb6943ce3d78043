"""Wording, required shape and read-back agree with what the original gave, in linear time."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor

from dataset.encode import build_chat
from dataset.prompt import (
    STYLES,
    build_messages,
    build_question,
    build_solution,
    extract_answer,
    load_style,
    matches_format,
    save_style,
)

FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = json.loads((FIXTURES / "prompts.json").read_text(encoding="utf-8"))["cases"]
REWARDS = json.loads((FIXTURES / "rewards.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("style", ["answer", "think"])
@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: str(case["row"]["id"]))
def test_wording_equals_the_originals(case, style):
    row = case["row"]
    assert build_question(row["question_text"], row["multi_choice"], style) == case[style]["mmau_text"]
    assert build_solution(row["multi_choice"][row["answer"]]) == case[style]["solution"]


@pytest.mark.parametrize("style", ["answer", "think"])
def test_chat_text_equals_the_originals(small_model, style):
    processor = AutoProcessor.from_pretrained(small_model)
    for case in PROMPTS:
        assert build_chat(processor, case[style]["text"]) == case[style]["chat_text"]


@pytest.mark.parametrize("style", ["answer", "think"])
def test_chat_text_and_token_ids_with_the_real_processor(shared, style):
    processor = AutoProcessor.from_pretrained(shared / "models" / "qwen2-audio-7b-no-weights")
    recorded = json.loads((shared / "fixtures" / "prompts.json").read_text(encoding="utf-8"))["cases"]
    for case in recorded:
        expected = case["think_on" if style == "think" else "think_off"]
        chat = build_chat(processor, expected["prompt"][0]["content"][1]["text"])
        assert chat == expected["chat_text"]
        assert processor.tokenizer(chat)["input_ids"] == expected["chat_text_token_ids"]


def test_choice_style_is_the_question_and_its_options():
    expected = "What? Please choose the answer from the following options: ['a', \"b's\"]."
    assert build_question("What?", ["a", "b's"], "choice") == expected


def test_what_is_to_be_written():
    assert [STYLES[style].target("dog") for style in ("choice", "answer")] == ["dog", "<answer>dog</answer>"]
    with pytest.raises(ValueError, match="think"):
        STYLES["think"].target("dog")
    completion = "<think>cat</think> <answer>cat</answer>"
    replies = [style.reply("dog", completion) for style in STYLES.values()]
    assert replies == ["dog", "<answer>dog</answer>", "<think>cat</think> <answer>dog</answer>"]
    for style, reply in zip(STYLES.values(), replies, strict=True):
        assert style.shape.fullmatch(reply)


def test_messages_are_the_audio_and_then_the_text():
    (message,) = build_messages("What?")
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["audio", "text"]
    assert message["content"][1]["text"] == "What?"


@pytest.mark.parametrize("case", REWARDS, ids=lambda case: case["completion"][:40])
def test_shape_and_read_back_equal_the_originals(case):
    assert matches_format(case["completion"], "answer") == bool(case["format"])
    assert matches_format(case["completion"], "think") == bool(case["format_think"])
    assert extract_answer(case["completion"]) == case["model_prediction"]


def test_unknown_style_is_refused_with_the_known_ones():
    for call in (lambda: build_question("q", ["a"], "thick"), lambda: matches_format("a", "thick")):
        with pytest.raises(ValueError, match="'thick'.*choice, answer, think"):
            call()


# Texts made of tags and what lies between them, where regular expressions and our scanning could part ways.
PIECES = ["<answer>", "</answer>", "<think>", "</think>", "\n", " ", "dog", "<", "answer>", "\u2028", "\r", "\x0b", "é"]
tagged = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@given(tagged | st.text())
def test_scanning_equals_the_regular_expressions(text):
    found = re.search(r"<answer>(.*?)</answer>", text)
    assert extract_answer(text) == (found.group(1) if found else text).strip()
    for style, pattern in (
        ("answer", r"<answer>.*?</answer>"),
        ("think", r"<think>.*?</think>\s*<answer>.*?</answer>"),
    ):
        assert matches_format(text, style) == (re.fullmatch(pattern, text, re.DOTALL) is not None)
    assert matches_format(text, "choice")


@pytest.mark.parametrize(
    "unit",
    ["<answer>", "</answer>", "<think>", "</think>", "</think> ", "<answer></answer", "</think>\n<answer>", "\n"],
)
def test_a_megabyte_of_anything_takes_no_time(unit):
    body = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    for text in (body, "<answer>" + body, "<think>" + body + "</answer>", body + "</answer>"):
        extract_answer(text)
        for style in STYLES:
            matches_format(text, style)
    assert time.perf_counter() - start < 2  # quadratic time would be minutes


def test_style_record(tmp_path):
    assert load_style(tmp_path) is None and load_style(tmp_path / "gone") is None
    for style in STYLES:
        save_style(tmp_path, style)
        assert load_style(tmp_path) == style
    (tmp_path / "prompt_style.json").write_text('{"prompt_style": "loud"}')
    with pytest.raises(ValueError, match="prompt_style.json.*'loud'"):
        load_style(tmp_path)
    (tmp_path / "prompt_style.json").write_text("[]")
    with pytest.raises(ValueError, match="prompt_style.json"):
        load_style(tmp_path)
    with pytest.raises(ValueError, match="loud"):
        save_style(tmp_path, "loud")
