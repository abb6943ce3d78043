"""What a process died of, told to the launcher that started it: in the file that torchrun names to each process.

A process that a signal ends writes none. Leaves out what the launcher makes of it, see `start.py`.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's variable; its own code reads `message` and `timestamp`
LAUNCH = "LAUNCH_ID"  # in the processes' environment: tells one call of a launcher from another, through its restarts


class Failure(NamedTuple):
    """What a process wrote down."""

    message: str  # its traceback, or the sentence that it ended with
    mistake: bool  # a sentence: another try would end the same way
    said: bool  # by the process; else it is the launcher that says it, once for all processes
    at: float  # seconds since the epoch
    rank: int


@contextmanager
def recorded() -> Iterator[None]:
    """Record what ends the block, if that is an exception or an exit with a message; it is raised on. The message is
    left to the launcher, if there is one: all processes would say the same."""
    try:
        yield
    except SystemExit as error:
        said = not isinstance(error.code, str)  # a number: that of a parser, say, which has printed its reason
        if error.code:
            _write(str(error.code), mistake=True, said=said)
        if said or LAUNCH not in os.environ:
            raise
        raise SystemExit(1) from None
    except Exception as error:
        _write("".join(traceback.format_exception(error)), mistake=False, said=True)
        raise


def _write(message: str, mistake: bool, said: bool) -> None:
    if FILE in os.environ:
        now = time.time()
        failure = Failure(message.strip(), mistake, said, now, int(os.environ.get("RANK", 0)))
        Path(os.environ[FILE]).write_text(json.dumps(failure._asdict() | {"timestamp": int(now)}), encoding="utf-8")


def read_failures(folder: Path) -> list[Failure]:
    """What the processes of a start wrote, in the order of time.

    Args:
        folder: torchrun's for this start; it holds one for each process.
    """
    written = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/error.json")]
    return sorted((Failure(**{key: one[key] for key in Failure._fields}) for one in written), key=lambda one: one.at)


def stop_without_launcher() -> None:
    """Have the system send this process SIGTERM if the one that started it dies: nobody could stop it any more. On
    Linux, and under torchrun, which puts its processes into sessions of their own."""
    if FILE in os.environ and sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
