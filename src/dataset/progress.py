"""Progress on the terminal as a bar; elsewhere, as in a batch system's log, as a plain line now and then."""

import sys
from typing import TextIO

from tqdm import tqdm

SECONDS = 30  # between two lines where there is no terminal


class PlainLines:
    """A stream that writes each state of a bar as a line of its own, without carriage returns."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(*args, **kwargs) -> tqdm:
    """tqdm's bar on standard error, with its arguments. Where that is no terminal, and the work takes less than
    `SECONDS`, nothing is shown."""
    if not sys.stderr.isatty():
        kwargs = {"file": PlainLines(sys.stderr), "ascii": True, "delay": SECONDS, "mininterval": SECONDS} | kwargs
        kwargs |= {"maxinterval": 2 * SECONDS}
    return tqdm(*args, **kwargs)
