"""How reward functions are called, and what they may return.

A function gets the arguments that it names. Its values are checked before TRL makes NaN of None, after which a broken
value could not be told from one that is not there; what it raises in one process is raised in all. Leaves out the
rewards themselves (`utils/rewards.py`).
"""

import asyncio
import inspect
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Real
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState
from trl.trainer.utils import get_callable_name, is_async_callable, start_event_loop_in_daemon

from dataset.rows import DataError

EXPECTED = "a list with one number for each completion is expected, None where the reward does not apply"
LARGEST = torch.finfo(torch.float32).max  # TRL computes with rewards in float32, where more is infinite
COLUMNS = ("prompt", "completion", "completion_ids")  # that TRL does not hand on under their own names


class RewardError(DataError):
    """A reward that cannot be called or used: the message names it, and what is expected."""


class CheckedReward:
    """A reward function in the form that TRL calls, with its values checked.

    The function gets, of `prompts`, `completions`, `completion_ids`, the data set's columns and what TRL adds
    (`trainer_state`, `log_extra`, `log_metric`), the arguments that it names, or all of them if it takes `**kwargs`.
    What a call raises is kept in `error` for `raise_together`: TRL goes on to gather the rewards of all processes,
    which would wait for one that is gone.
    """

    def __init__(self, function: Callable):
        self.function: Any = function  # what it returns is checked
        self.error: Exception | None = None
        self.__name__ = get_callable_name(function)  # of TRL's metrics

    def __call__(self, **given) -> list[float | None]:
        self.error = None
        try:
            return check_values(self.__name__, self.function(**self._named(given)), given)
        except Exception as error:
            return self._keep(error, given)

    def try_out(self, given: dict) -> None:
        """Call it with `given`; a `RewardError` says what is wrong with the function or its values."""
        self(**given)
        self._raise_as_found(given)

    def _named(self, given: dict) -> dict:
        """Those of the arguments `given` that the function takes."""
        parameters = inspect.signature(self.function).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        lacking = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name not in given
        ]
        if lacking:
            raise RewardError(
                f"reward {self.__name__}: asks for {', '.join(f'`{name}`' for name in lacking)}, which is not there; "
                f"a reward can ask for {', '.join(given)}"
            )
        everything = inspect.Parameter.VAR_KEYWORD in kinds
        return {name: value for name, value in given.items() if everything or name in parameters}

    def _keep(self, error: Exception, given: dict) -> list[float | None]:
        self.error = error
        return [0.0] * len(given["completions"])

    def _raise_as_found(self, given: dict) -> None:
        error = self.error
        how = f"a trial call on two made-up completions, {given['completions']}"
        if isinstance(error, RewardError):
            raise RewardError(f"{error} (found by {how})") from error
        if error is not None:
            code = getattr(self.function, "__code__", None) or getattr(self.function.__call__, "__code__", None)
            described = describe_error(error, code and code.co_filename)
            raise RewardError(f"reward {self.__name__}: {described}, in {how}") from error


class AsyncReward(CheckedReward):
    """A reward that is a coroutine function. All its calls, the trial's too, run in one event loop: a client that it
    keeps open belongs to the loop that it was first used in."""

    async def __call__(self, **given) -> list[float | None]:  # type: ignore[override]
        self.error = None
        try:
            call = asyncio.run_coroutine_threadsafe(self.function(**self._named(given)), _event_loop())
            return check_values(self.__name__, await asyncio.wrap_future(call), given)
        except Exception as error:
            return self._keep(error, given)

    def try_out(self, given: dict) -> None:
        asyncio.run(self(**given))
        self._raise_as_found(given)


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    _, loop, ready = start_event_loop_in_daemon("rewards")
    ready.wait()
    return loop


def checked(reward):
    """A reward function as a `CheckedReward`; one that is so already, a reward model or its name as it is."""
    if isinstance(reward, (str, torch.nn.Module, CheckedReward)):
        return reward
    return (AsyncReward if is_async_callable(reward) else CheckedReward)(reward)


def check_values(name: str, values, given: dict) -> list[float | None]:
    """What a reward returned for B completions, as B floats or None.

    Args:
        name: of the reward.
        given: the arguments of the call: `completions`, and as far as they are there `prompts`, `row`, `audio_path`,
            by which a message names the row.

    Raises:
        RewardError: it is no list, has too few or too many values, or one that is no number, NaN or infinite.
    """
    if not isinstance(values, (list, tuple)):
        remedy = "; `.tolist()` makes one" if hasattr(values, "tolist") else ""
        raise RewardError(
            f"reward {name}: returned {values!r:.80}, of type {type(values).__name__}; {EXPECTED}{remedy}"
        )
    for value in values:
        if value is not None and not isinstance(value, Real):
            found = f"{value!r:.80}, of type {type(value).__name__}"
            raise RewardError(f"reward {name}: returned a list with {found}; {EXPECTED}")
    completions = given["completions"]
    if len(values) != len(completions):
        count = f"{len(values)} values for {len(completions)} completions"
        raise RewardError(f"reward {name}: returned {count}; {EXPECTED}")
    for index, value in enumerate(values):
        if value is not None and not abs(value) <= LARGEST:
            raise RewardError(
                f"reward {name}: is {value} for the completion {completions[index]!r:.200} {_row(given, index)}; "
                "a finite number is expected, or None where the reward does not apply"
            )
    return [None if value is None else float(value) for value in values]


def _row(given: dict, index: int) -> str:
    """Which question a completion answers, by what is known of it."""
    known = [f"{title} {given[key][index]}" for key, title in (("row", "line"), ("audio_path", "clip")) if key in given]
    known += [f"question {given['prompts'][index]!r:.200}"] if "prompts" in given else []
    return f"({', '.join(known)})"


def describe_error(error: Exception, file: str | None) -> str:
    """What a person's own code raised, and where in its file; libraries that it called are passed over."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"raised {type(error).__name__}: {error}" + (f" ({file}, line {lines[-1]})" if lines else "")


def try_rewards(rewards: Sequence[CheckedReward], dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Call each reward once on two made-up completions of the data set's first questions: a right answer, and a text
    that is none. What is wrong with it is found before the model is loaded, not after the first rollouts.

    Raises:
        RewardError: one cannot be called so, raises an error, or returns what is no list of numbers.
    """
    rows = [dataset[index % len(dataset)] for index in range(2)]
    completions = [rows[0]["solution"], "a made-up completion"]
    given: dict[str, Any] = {"prompts": [row["prompt"] for row in rows], "completions": completions}
    given["completion_ids"] = tokenizer(completions)["input_ids"]
    given |= {key: [row[key] for row in rows] for key in dataset.column_names if key not in COLUMNS}
    given |= {"trainer_state": TrainerState(), "log_extra": _log_nowhere, "log_metric": _log_nowhere}
    for reward in rewards:
        reward.try_out(given)


def _log_nowhere(name: str, value) -> None:
    """Stands for TRL's `log_extra` and `log_metric` in the trial call."""


def find_error(rewards: Sequence, names: Sequence[str], values: torch.Tensor, given: dict) -> Exception | None:
    """What went wrong in this process when the rewards were computed: raised by a function, or returned by a model.

    Args:
        rewards, names: F reward functions and models, and what TRL calls them.
        values: (B, F), of this process's completions.
        given: as `check_values` takes it.
    """
    for reward, name, column in zip(rewards, names, values.T, strict=True):
        if isinstance(reward, torch.nn.Module):
            try:
                check_values(name, column.tolist(), given)
            except RewardError as error:
                return error
        elif isinstance(reward, CheckedReward) and reward.error:  # TRL may add functions of its own
            return reward.error
    return None


def raise_together(error: Exception | None) -> None:
    """Raise this process's error, or else, a second later, a `RewardError` with that of another one; to be called by
    all. The launcher says the error that was written down first: that should be the one with the traceback."""
    told = error and (str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}")
    others = gather_object([told])
    if error:
        raise error
    for process, text in enumerate(others):
        if text:
            time.sleep(1)
            raise RewardError(f"process {process}: {text}")
