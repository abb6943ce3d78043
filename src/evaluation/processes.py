"""The processes of one run: ranks, shared results and errors, and a common exit."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")


def processes() -> PartialState:
    """The process group of this run. It exchanges only small Python objects, hence a CPU group on any device. The
    timeout covers the wait for another process's last batch."""
    return PartialState(cpu=True, timeout=timedelta(days=7))


def run_on_all(compute: Callable[[], T], main: bool = False) -> T:
    """Run `compute` in every process and return its result there; with `main=True`, run it in the first process only
    and broadcast the result. A `ValueError` or `OSError` in any process is raised in all, so that none waits for it."""
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
    """Call `close` and destroy the process group, in all processes at the same time: a process that exits earlier may
    make others abort."""
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        # Destroying the group holds Python's lock and joins Gloo's threads, which need that lock to release the last
        # collective's tensors: a deadlock in torch 2.13 unless they have done so.
        time.sleep(0.5)
    if close:
        close()
    state.destroy_process_group()
