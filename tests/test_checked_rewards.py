"""A reward that cannot be used is found before the model is loaded, a broken value when it comes, on all processes."""

import asyncio
import functools

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import train
from dataset.dataset import load_train_dataset
from running import free_port, run
from test_grpo_trainer import length_reward, make_trainer
from trainer.checked_rewards import RewardError, check_values, checked, find_error, try_rewards
from utils.rewards import accuracy_reward, format_reward

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

def tensors(completions, **kwargs):
    import torch
    return list(torch.ones(len(completions)))

def broken(completions, **kwargs):
    return [1 / 0 for _ in completions]

def divided(completions, **kwargs):
    return [float("nan") for _ in completions]

def huge(completions, **kwargs):
    return [1e39 for _ in completions]

def label(completions, label, **kwargs):
    return [0.0 for _ in completions]

def unnamed(texts):
    return [0.0 for _ in texts]

async def late(completions):
    return "no list"

def lazy(completions):
    return (0.0 for _ in completions)

not_callable = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def processor(small_model):
    return AutoProcessor.from_pretrained(small_model)


@pytest.fixture(scope="module")
def dataset(questions):
    return load_train_dataset(questions)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "reward number: returned 1.0, of type float; a list with one number for each completion is exp"),
        ("strings", "reward strings: returned a list with 'good', of type str; a list with one number"),
        ("few", "reward few: returned 1 values for 2 completions; a list"),
        ("tensor", r"reward tensor: returned tensor\(\[1., 1.\]\), of type Tensor; .*`.tolist\(\)` makes one"),
        ("tensors", r"reward tensors: returned a list with tensor\(1.\), of type Tensor; a list"),
        (
            "broken",
            r"reward broken: raised ZeroDivisionError: division by zero \(.*mine.py, line 34\), in a trial call",
        ),
        ("divided", r"reward divided: is nan for the completion '<answer>dog</answer>' \(line 1, clip .*0.wav, quest"),
        ("huge", "reward huge: is 1e[+]39 for the completion"),
        (
            "label",
            "reward label: asks for `label`, which is not there; .* completions, .*solution, style, row, trainer",
        ),
        ("unnamed", "reward unnamed: asks for `texts`, which is not there"),
        ("late", "reward late: returned 'no list', of type str"),
        ("lazy", "reward lazy: returned <generator .*of type generator; a list"),
        ("not_callable", "has no function 'not_callable'"),
    ],
)
def test_a_reward_that_cannot_be_used_is_found_by_a_trial_call(dataset, processor, file, name, message):
    with pytest.raises(RewardError, match=message) as found:
        train.load_rewards(["accuracy", f"{file}:{name}"], dataset, processor)
    assert "\n" not in str(found.value)


def test_a_file_that_cannot_be_run_is_said_with_its_line(tmp_path):
    (tmp_path / "bad.py").write_text("import os\nimport a_module_that_is_not_there\n")
    with pytest.raises(RewardError, match=r"bad.py:f: raised ModuleNotFoundError: .*bad.py, line 2\), when its file"):
        train.load_reward(f"{tmp_path}/bad.py:f")
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(RewardError, match=r"bad.py:f: raised SyntaxError: .*bad.py, line 1\), when its file"):
        train.load_reward(f"{tmp_path}/bad.py:f")


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")], [1.0, 1.0, 1.0]])
def test_weights_must_be_a_finite_number_for_each_reward(weights):
    with pytest.raises(RewardError, match="--reward_weights 1.0.*: one finite number for each of accuracy, format is"):
        train.check_weights(weights, ["accuracy", "format"])
    train.check_weights([1.0, 0.5], ["accuracy", "format"])


def test_a_reward_gets_what_it_names_and_is_tried_once(dataset, file, processor):
    named = train.load_reward(f"{file}:named")
    rewards = [checked(function) for function in (named, accuracy_reward, format_reward)]
    rewards += [checked(train.load_reward(f"{file}:{name}")) for name in ("logs", "waits")]
    try_rewards(rewards, dataset, processor.tokenizer)
    (completions, solution, row), *more = named.__globals__["calls"]
    assert not more and row == [1, 2] and solution == [dataset[0]["solution"], dataset[1]["solution"]]
    assert len(completions) == 2 and completions[0] == solution[0] != completions[1]
    try_rewards(rewards, dataset.select([0]), processor.tokenizer)
    assert named.__globals__["calls"][1][2] == [1, 1], "a data set of one question has no second"


def test_any_form_of_function_keeps_its_name_and_kind():
    class Length:
        def __call__(self, completions):
            return [len(text) for text in completions]

    def scaled(completions, factor):
        return [factor * len(text) for text in completions]

    given = {"completions": ["a", "four"], "prompts": ["", ""]}
    assert checked(Length())(**given) == [1.0, 4.0] and checked(Length()).__name__ == "Length"
    half = checked(functools.partial(scaled, factor=0.5))
    assert half(**given) == [0.5, 2.0] and half.__name__ == "scaled"
    assert checked(half) is half and checked("org/reward-model") == "org/reward-model"


def test_asynchronous_calls_share_one_event_loop(dataset, processor):
    """A client that is opened in the trial call must work in training, in whichever loop TRL calls from."""
    loops = []

    async def judge(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0 for _ in completions]

    reward = checked(judge)
    try_rewards([reward], dataset, processor.tokenizer)
    assert asyncio.run(reward(completions=["a", "b"], prompts=["", ""])) == [0.0, 0.0]
    assert loops[0] is loops[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, 10**400, np.float32("nan")])
def test_a_value_that_is_not_finite_names_reward_completion_and_row(value):
    given = {
        "completions": ["a", "b" * 500],
        "prompts": ["What?", "Why?"],
        "row": [7, 9],
        "audio_path": ["x.wav", "y.wav"],
    }
    with pytest.raises(
        RewardError, match=r"reward r: is .* completion 'b{190,199} \(line 9, clip y.wav, question 'Why"
    ):
        check_values("r", [1.0, value], given)
    assert check_values("r", [True, None], given) == [1.0, None]
    assert check_values("r", (np.float32(0.5), 2), given) == [0.5, 2.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_broken_value_stops_training_but_none_is_not_applicable(small_model, questions, tmp_path, value):
    calls = []

    def judge(completions):
        calls.append(len(completions))
        return [None] * len(completions) if len(calls) < 2 else [0.5] * (len(completions) - 1) + [value]

    trainer = make_trainer(
        small_model, questions, tmp_path, max_steps=3, save_strategy="no", rewards=[length_reward, judge]
    )
    with pytest.raises(RewardError, match=rf"reward judge: is {value} for the completion '.* \(line \d, clip .*\.wav"):
        trainer.train()
    assert trainer.state.global_step == 1 and len(calls) == 2
    assert "rewards/judge/mean" in trainer.state.log_history[0]


def test_a_reward_model_is_held_to_the_same():
    rewards, names = [checked(length_reward), torch.nn.Identity()], ["length_reward", "judge"]
    given = {"completions": ["a", "b"], "prompts": ["", ""]}
    values = torch.tensor([[1.0, 0.5], [1.0, float("nan")]])
    assert "reward judge: is nan for the completion 'b'" in str(find_error(rewards, names, values, given))
    assert find_error(rewards, names, torch.ones(2, 2), given) is None


@pytest.mark.slow
def test_what_one_process_finds_ends_all(preloaded, small_model, questions, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n\ndef judge(completions, trainer_state):\n"
        "    broken = trainer_state.global_step == 1 and os.environ['RANK'] == '1'\n"
        "    return [float('nan') if broken else 0.0 for _ in completions]\n"
    )
    done = run(
        "python", "src/launch/start.py", "--nproc_per_node", "2", "--master_port", free_port(), "src/train.py",
        "--use_cpu", "true", "--model_name_or_path", small_model, "--data_file", questions, "--max_steps", "3",
        "--questions_per_step", "2", "--num_generations", "2", "--max_completion_length", "4", "--output_dir", tmp_path / "out",
        "--reward_funcs", "accuracy", f"{tmp_path}/mine.py:judge", check=False, PRELOADED=preloaded,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    said = "reward judge: is nan for the completion"
    assert said in done.stdout.splitlines()[-1] and done.stdout.count(said) == 1, done.stdout
    assert "Traceback" not in done.stdout
