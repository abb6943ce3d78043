"""Why a process fails: recorded by the process in a folder that its launcher names, printed by the launcher at the end.

Standard library only: `launch.py` imports it too.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

FOLDER = "RUN_FAILURES"  # environment variable
MISTAKE = 2  # exit status after a mistake of the user, as argparse's: another try would end the same way


class Failure(NamedTuple):
    """Why a process failed. Failures sort by time."""

    time: float  # `time.monotonic()`, which all processes of a machine share
    rank: int
    status: int  # exit status, or -n for signal n
    text: str = ""  # the sentence of a mistake, or a traceback


@contextmanager
def recorded() -> Iterator[None]:
    """Around a script's main function: record why it fails.

    A `SystemExit` with a text is a mistake of the user. The process exits with `MISTAKE`, and the launcher prints the
    text once for all processes; without a launcher it is printed here. Other exceptions are recorded and raised again.
    """
    folder = os.environ.pop(FOLDER, "")  # not for processes that this one starts
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        if folder:
            _record(folder, MISTAKE, error.code)
        else:
            print(error.code, file=sys.stderr)
        raise SystemExit(MISTAKE) from None
    except Exception:
        if folder:
            _record(folder, 1, traceback.format_exc())
        raise


def _record(folder: str, status: int, text: str) -> None:
    rank = int(os.environ["RANK"])
    partial = Path(folder, f"{rank}.partial")  # the launcher may stop this process while it writes
    partial.write_text(json.dumps(Failure(time.monotonic(), rank, status, text)), encoding="utf-8")
    partial.rename(Path(folder, f"{rank}.json"))


def read_failures(folder: str) -> dict[int, Failure]:
    """The failures recorded in a folder, by rank."""
    failures = [Failure(*json.loads(path.read_text(encoding="utf-8"))) for path in Path(folder).glob("*.json")]
    return {failure.rank: failure for failure in failures}


def report(failures: Sequence[Failure], forwarded: Sequence[int]) -> None:
    """Print what the processes could not print, and repeat the first of several tracebacks.

    Args:
        failures: the first one first.
        forwarded: signals that the launcher sent; a process may end by them.
    """
    first = failures[0]
    tracebacks = [failure for failure in failures if failure.text and failure.status != MISTAKE]
    if first.status < 0 and -first.status not in forwarded:
        hint = " (out of memory, if nobody sent it)" if first.status == -signal.SIGKILL else ""
        name = signal.Signals(-first.status).name
        print(f"process {first.rank} was ended by {name}{hint}; the others were stopped", file=sys.stderr)
    elif len(tracebacks) > 1 and first is tracebacks[0]:
        print(f"process {first.rank} failed first:\n{first.text.rstrip()}", file=sys.stderr)
    for sentence in dict.fromkeys(failure.text for failure in failures if failure.status == MISTAKE):
        print(sentence, end="\n" if sentence else "", file=sys.stderr)
