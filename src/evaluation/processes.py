"""The processes of one run: their number and ranks, results and errors that all of them share, and a common exit."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")
SETTLED = 0.5  # s


def processes() -> PartialState:
    """The process group of this run. It exchanges small Python objects only, hence a CPU group on any device. The
    timeout covers the wait for another process's last batch."""
    return PartialState(cpu=True, timeout=timedelta(days=7))


def run_on_all(compute: Callable[[], T], main: bool = False) -> T:
    """Run `compute` in every process and return its result there; with `main=True`, run it in the first process only
    and broadcast the result.

    Raises:
        ValueError, OSError: raised by `compute` in any process. All processes raise it, so none waits for another.
    """
    result: Any = None
    error: ValueError | OSError | None = None
    if not main or processes().is_main_process:
        try:
            result = compute()
        except (ValueError, OSError) as raised:
            error = raised
    for found in gather_object([error]):
        if found is not None:
            raise found
    return broadcast_object_list([result])[0] if main else result


def say(text: str) -> None:
    """Print a line to standard error, from the first process only."""
    if processes().is_main_process:
        print(text, file=sys.stderr, flush=True)


def leave(close: Callable[[], None] | None = None) -> None:
    """Destroy the process group, in all processes at the same time: a process that exits before may make others abort.

    Args:
        close: shuts down what uses the group, before it is destroyed.
    """
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        # Gloo's threads may still hold the last collective's tensors, which they release under Python's lock. To
        # destroy the group holds that lock while it joins the threads: a deadlock, seen in torch 2.13.
        time.sleep(SETTLED)
    if close:
        close()
    state.destroy_process_group()
