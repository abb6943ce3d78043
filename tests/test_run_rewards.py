"""Rewards of a run: found by name, tried before the model is loaded, their values checked in every call."""

import asyncio
import functools

import numpy as np
import pytest

from conftest import ROOT
from dataset.dataset import load_train_dataset
from dataset.rows import DataError
from model.qwen2_audio import load_processor
from run.rewards import check_values, check_weights, checked, load_reward, load_rewards, reward_files
from running import run
from runs import length_reward
from test_grpo_trainer import make_trainer
from utils.rewards import accuracy_reward

REWARDS = """
calls = []

def named(completions, solution, row):
    calls.append((completions, solution, row))
    return [1.0, None]

def logs(completions, log_metric, log_extra, trainer_state, completion_ids, **kwargs):
    log_metric("steps", trainer_state.global_step)
    log_extra("ids", completion_ids)
    return [len(ids) for ids in completion_ids]

async def waits(completions):
    return [0.5 for _ in completions]

def number(completions, **kwargs):
    return 1.0

def strings(completions, **kwargs):
    return ["good" for _ in completions]

def few(completions, **kwargs):
    return [1.0]

def tensor(completions, **kwargs):
    import torch
    return torch.ones(len(completions))

def broken(completions, **kwargs):
    return [1 / 0 for _ in completions]

def divided(completions, **kwargs):
    return [float("nan") for _ in completions]

def label(completions, label, **kwargs):
    return [0.0 for _ in completions]

async def late(completions):
    return "no list"

def lazy(completions):
    return (0.0 for _ in completions)

not_callable = 3
"""
GIVEN = {"completions": ["a", "four"], "prompts": ["", ""]}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def dataset(questions):
    return load_train_dataset(questions)


@pytest.fixture(scope="module")
def tokenizer(small_model):
    return load_processor(small_model).tokenizer


def test_rewards_are_found_by_name(file):
    assert load_reward("accuracy") is accuracy_reward
    assert load_reward(f"{file}:named").__name__ == "named"
    assert reward_files(["accuracy", f"{file}:named", "format"]) == [str(file)]


@pytest.mark.parametrize("name", ["speed", "gone.py:f", "{file}:nothing", "{file}", "{file}:not_callable"])
def test_a_reward_that_does_not_exist(file, name):
    with pytest.raises(DataError) as found:
        load_reward(name := name.format(file=file))
    assert f"--reward_funcs {name}" in str(found.value)


@pytest.mark.parametrize("code, line", [("import os\nimport a_missing_module\n", 2), ("def f(:\n", 1)])
def test_a_file_that_cannot_be_run_is_named_with_its_line(tmp_path, code, line):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(DataError) as found:
        load_reward(f"{tmp_path}/bad.py:f")
    assert f"{tmp_path}/bad.py" in str(found.value) and f"line {line}" in str(found.value)


@pytest.mark.parametrize("name", ["number", "strings", "few", "tensor", "broken", "divided", "label", "late", "lazy"])
def test_an_unusable_reward_is_found_by_a_trial_call(dataset, tokenizer, file, name):
    with pytest.raises(DataError) as found:
        load_rewards(["accuracy", f"{file}:{name}"], dataset, tokenizer)
    assert name in str(found.value) and "\n" not in str(found.value)


def test_a_reward_gets_what_it_names_and_is_tried_once(dataset, tokenizer, file, monkeypatch):
    named = load_reward(f"{file}:named")
    monkeypatch.setattr("run.rewards.REWARD_FUNCS", {"accuracy": accuracy_reward, "named": named})
    load_rewards(["named", "accuracy", f"{file}:logs", f"{file}:waits"], dataset, tokenizer)
    (completions, solution, row), *more = named.__globals__["calls"]
    assert not more and row == [1, 2] and solution == dataset["solution"][:2]
    assert len(completions) == 2 and completions[0] == solution[0] != completions[1]
    load_rewards(["named"], dataset.select([0]), tokenizer)
    assert named.__globals__["calls"][1][2] == [1, 1], "a data set of one question has no second"


def test_any_callable_keeps_its_name():
    class Length:
        def __call__(self, completions):
            return [len(text) for text in completions]

    def scaled(completions, factor):
        return [factor * len(text) for text in completions]

    assert checked(Length())(**GIVEN) == [1.0, 4.0] and checked(Length()).__name__ == "Length"
    assert checked(functools.partial(scaled, factor=0.5))(**GIVEN) == [0.5, 2.0]


def test_asynchronous_calls_share_one_event_loop():
    """A client that the trial call opens must work in training."""
    loops = []

    async def judge(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0 for _ in completions]

    reward = checked(judge)
    assert reward(**GIVEN) == reward(**GIVEN) == [0.0, 0.0]
    assert loops[0] is loops[1]


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e39, 10**400, np.float32("nan"), "1", 1j])
def test_a_value_that_is_no_finite_number_names_reward_and_row(value):
    given = GIVEN | {"row": [7, 9], "audio_path": ["x.wav", "y.wav"]}
    with pytest.raises(DataError) as found:
        check_values("judge", [1.0, value], given)
    assert all(part in str(found.value) for part in ("judge", "'four'", "row 9", "y.wav"))
    check_values("judge", [True, None], given)
    check_values("judge", (np.float32(0.5), 2), given)


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")], [1.0, 1.0, 1.0]])
def test_weights_must_be_a_finite_number_for_each_reward(weights):
    with pytest.raises(DataError, match="--reward_weights"):
        check_weights(weights, ["accuracy", "format"])
    check_weights([1.0, 0.5], ["accuracy", "format"])


def test_one_broken_value_stops_training_but_none_is_not_applicable(small_model, questions, tmp_path):
    calls = []

    def judge(completions):
        calls.append(len(completions))
        return [None] * len(completions) if len(calls) < 2 else [0.5] * (len(completions) - 1) + [float("nan")]

    rewards = [length_reward, checked(judge)]
    trainer = make_trainer(small_model, questions, tmp_path, max_steps=3, save_strategy="no", rewards=rewards)
    with pytest.raises(DataError, match="reward judge: .*row \\d"):
        trainer.train()
    assert trainer.state.global_step == 1 and len(calls) == 2
    assert "rewards/judge/mean" in trainer.state.log_history[0]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(small_model, questions, tmp_path):
    """And until then a reward from a file is logged under its name."""
    (tmp_path / "mine.py").write_text(
        "import os\n\ndef judge(completions, trainer_state):\n"
        "    broken = trainer_state.global_step == 1 and os.environ['RANK'] == '1'\n"
        "    return [float('nan') if broken else 0.0 for _ in completions]\n"
    )
    done = run(
        "python", "src/run/launch.py", "src/train.py", "--use_cpu", "true", "--model_name_or_path", small_model,
        "--data_file", questions, "--max_steps", "3", "--questions_per_step", "2", "--num_generations", "2",
        "--max_completion_length", "4", "--output_dir", tmp_path / "out", "--reward_funcs", "accuracy",
        f"{tmp_path}/mine.py:judge", check=False, GPU_NUM=2, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert done.stdout.count("reward judge:") == 1 and "Traceback" not in done.stdout, done.stdout
    assert "rewards/judge/mean" in (tmp_path / "out" / "log.jsonl").read_text()
