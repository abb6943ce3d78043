"""The rewards equal the original's, but for what only math-verify had called equal."""

import json
from pathlib import Path

import pytest

from utils.rewards import accuracy_reward, format_reward

CASES = json.loads((Path(__file__).parent / "fixtures" / "rewards.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize(
    "wrap", [str, lambda text: [{"role": "assistant", "content": text}]], ids=["plain", "messages"]
)
def test_rewards_equal_the_originals(wrap):
    completions = [wrap(case["completion"]) for case in CASES]
    solutions = [case["solution"] for case in CASES]
    expected = [0.0 if case["by"] == "math" else case["accuracy"] for case in CASES]
    assert accuracy_reward(completions, solution=solutions, prompts=None) == expected
    for style, key in (("answer", "format"), ("think", "format_think")):
        assert format_reward(completions, style=[style] * len(CASES), prompts=None) == [case[key] for case in CASES]


def test_each_completion_is_judged_by_its_own_style():
    texts = ["<answer>a</answer>", "<answer>a</answer>", "a"]
    assert format_reward(texts, style=["answer", "think", "choice"]) == [1.0, 0.0, 1.0]


def test_errors_are_not_turned_into_zeros():
    with pytest.raises(ValueError):
        accuracy_reward(["a", "b"], solution=["a"])
    with pytest.raises((TypeError, AttributeError)):
        accuracy_reward(["a"], solution=[None])
    with pytest.raises(ValueError, match="loud"):
        format_reward(["a"], style=["loud"])
