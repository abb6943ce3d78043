"""Reward functions of a run: found by name, called with the arguments that they name, their values checked.

An error in one process is raised in all, so that no process waits for one that is gone.
"""

import asyncio
import inspect
import runpy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.hf_argparser import HfArg

from dataset.rows import DataError
from evaluation.processes import run_on_all
from utils.rewards import accuracy_reward, format_reward

REWARD_FUNCS: dict[str, Callable[..., list[float]]] = {"accuracy": accuracy_reward, "format": format_reward}
EXPECTED = "return a list with one number per completion, None where the reward does not apply"
RUNNER = asyncio.Runner()  # one event loop for all calls, to which a client that a reward keeps open belongs
LARGEST = torch.finfo(torch.float32).max  # TRL computes with rewards in float32, where more is infinite


@dataclass
class RewardArguments:
    """What to reward."""

    reward_funcs: list[str] = HfArg(
        default_factory=lambda: list(REWARD_FUNCS), help="Summed: accuracy, format, or yours as file.py:name."
    )
    resample_uniform_groups: bool = HfArg(default=False, help="Replace questions whose rewards all agree. Paper: no.")
    max_resample_rounds: int = HfArg(default=4, help="Further rounds of rollouts for that, per generation batch.")


def load_rewards(names: Sequence[str], dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Callable]:
    """Checked rewards by their names. The first process calls each once on two made-up completions, before a model is
    loaded. Raises a `DataError` as `load_reward`, and for a failed call."""
    functions = [load_reward(name) for name in names]
    rows = [dataset[index % len(dataset)] for index in range(2)]
    completions = [rows[0]["solution"], "a made-up completion"]
    given: dict[str, Any] = {"completions": completions, "completion_ids": tokenizer(completions)["input_ids"]}
    given |= {key: [row[key] for row in rows] for key in dataset.column_names}
    given["prompts"] = given.pop("prompt")
    given |= {"trainer_state": TrainerState(), "log_extra": lambda *_: None, "log_metric": lambda *_: None}

    def try_all() -> None:
        for name, function in zip(names, functions, strict=True):
            try:
                call(function, given)
            except DataError:
                raise
            except Exception as error:
                trial = f"a trial call with {', '.join(given)}"
                raise DataError(f"--reward_funcs {name}: {trial} {describe_error(error)}") from error

    run_on_all(try_all, main=True)
    return [checked(function) for function in functions]


def load_reward(name: str) -> Callable:
    """A reward by its name: `accuracy`, `format`, or `path/to/file.py:function`.

    The function gets the arguments that it names, of `completions`, `prompts`, `completion_ids` and every column of the
    data set (`solution`, `style`, `audio_path`, ...), and returns a list with one number per completion (None: not
    applicable). It may be a coroutine function. A trial call must be harmless for stateful or paid rewards. Raises a
    `DataError` if there is no such reward, file or function, or if the file cannot be run.
    """
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise DataError(f"--reward_funcs {name}: use one of {', '.join(REWARD_FUNCS)}, or file.py:function")
    try:
        reward = runpy.run_path(path).get(function)
    except Exception as error:
        raise DataError(f"--reward_funcs {name}: running the file {describe_error(error)}") from error
    if not callable(reward):
        raise DataError(f"--reward_funcs {name}: {path} has no function {function!r}")
    return reward


def reward_files(names: Sequence[str]) -> list[str]:
    """The files among the names of rewards."""
    return [path for path in (name.rpartition(":")[0] for name in names) if Path(path).is_file()]


def checked(function: Callable) -> Callable[..., list[float | None]]:
    """A reward function in the form that TRL calls, which raises the errors of all processes."""

    def reward(**given) -> list[float | None]:
        error: Exception | None = None
        try:
            values = call(function, given)
        except Exception as raised:
            error = raised
        # All raise a wrong value; an error of a reward's code is left to its process, which has the traceback.
        found = gather_object([error if error is None or isinstance(error, DataError) else SystemExit(1)])
        for first in filter(None, [error, *found]):
            raise first
        return values

    reward.__name__ = name_of(function)  # in the names of metrics
    return reward


def name_of(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def call(function: Callable, given: dict) -> list[float | None]:
    """Call a reward function with those of the arguments `given` that it takes, and check its values."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    values = function(**{key: value for key, value in given.items() if takes_all or key in parameters})
    if inspect.iscoroutine(values):
        values = RUNNER.run(values)
    check_values(name_of(function), values, given)
    return [None if value is None else float(value) for value in values]


def check_values(name: str, values, given: dict) -> None:
    """Raise a `DataError` unless a reward returned a list with a finite number, or None, for each completion. `given`
    are the arguments of the call, of which `row`, `audio_path` and `prompts` name the question in the message."""
    completions = given["completions"]
    if not isinstance(values, list | tuple) or len(values) != len(completions):
        counts = f"{values!r:.80}, a {type(values).__name__}, for {len(completions)} completions"
        raise DataError(f"reward {name}: returned {counts}; {EXPECTED}")
    for index, value in enumerate(values):
        if not (value is None or isinstance(value, Real) and -LARGEST <= value <= LARGEST):  # type: ignore[operator]
            known = [f"{key} {given[key][index]!r:.200}" for key in ("row", "audio_path", "prompts") if key in given]
            where = f"{completions[index]!r:.200} ({', '.join(known)})"
            raise DataError(f"reward {name}: is {value!r:.80} for the completion {where}; {EXPECTED}")


def describe_error(error: Exception) -> str:
    """What a user's code raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def check_weights(weights: Sequence[float], names: Sequence[str]) -> None:
    """Raise a `DataError` unless there is one finite weight for each of the rewards."""
    if len(weights) != len(names) or not all(map(isfinite, weights)):
        raise DataError(f"--reward_weights {weights}: pass one finite number for each of {', '.join(names)}")
