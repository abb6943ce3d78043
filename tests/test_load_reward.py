"""Rewards by name, and a function of one's own from a file."""

import sys

import pytest

from running import run
from train import load_reward
from utils.rewards import accuracy_reward

BREVITY = '''
SHORTEST = 1

def brevity(completions, **kwargs):
    """1 for a single character, less for more."""
    return [1 / max(len(text), SHORTEST) for text in completions]
'''


BROKEN = """
def broken(completions, trainer_state, **kwargs):
    return [1 / (1 - trainer_state.global_step)] * len(completions)
"""


def test_built_in_and_own_rewards(tmp_path):
    assert load_reward("accuracy") is accuracy_reward
    (tmp_path / "my_rewards.py").write_text(BREVITY)
    brevity = load_reward(f"{tmp_path / 'my_rewards.py'}:brevity")
    assert brevity(completions=["a", "four"], solution=["", ""]) == [1.0, 0.25]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("speed", "it is one of accuracy, format, or file.py:function"),
        ("gone.py:f", "there is no file gone.py"),
        ("{file}:nothing", "has no function 'nothing'"),
        ("{file}", "unknown reward"),
    ],
)
def test_a_reward_that_is_not_there(tmp_path, name, message):
    (tmp_path / "my_rewards.py").write_text(BREVITY)
    with pytest.raises(ValueError, match=message):
        load_reward(name.format(file=tmp_path / "my_rewards.py"))


@pytest.mark.slow
def test_an_own_reward_trains_and_its_errors_stop_the_run(preloaded, small_model, questions, tmp_path):
    (tmp_path / "my_rewards.py").write_text(BREVITY + BROKEN)
    flags = [
        "--use_cpu", "true", "--model_name_or_path", small_model, "--data_file", questions, "--max_steps", "2",
        "--questions_per_step", "2", "--num_generations", "2", "--max_completion_length", "4", "--output_dir", tmp_path / "out",
        "--reward_funcs", "accuracy",
    ]  # fmt: skip
    done = run(sys.executable, "src/train.py", *flags, f"{tmp_path}/my_rewards.py:brevity")
    assert "rewards/brevity/mean" in (tmp_path / "out" / "log.jsonl").read_text(), done.stdout
    chatter = ("\r", "Writing model shards", "Loading weights", "deprecated", "Setting accelerator")
    assert not [word for word in chatter if word in done.stdout], done.stdout
    done = run(
        "python", "src/train.py", *flags, f"{tmp_path}/my_rewards.py:broken", "--overwrite_output_dir", "true",
        check=False, PRELOADED=preloaded,
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" in done.stdout and "ZeroDivisionError" in done.stdout
