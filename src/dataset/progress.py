"""Progress as a bar on a terminal, and as plain lines in a log."""

import sys
from typing import TextIO

from tqdm import tqdm

SECONDS = 30  # between two lines of a log


class PlainLines:
    """A stream that writes each state of a bar as a line, without carriage returns."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(*args, **kwargs) -> tqdm:
    """tqdm's bar on standard error. Without a terminal, shows nothing for work of less than `SECONDS`."""
    if not sys.stderr.isatty():
        kwargs = {"file": PlainLines(sys.stderr), "ascii": True, "delay": SECONDS, "mininterval": SECONDS} | kwargs
        kwargs |= {"maxinterval": 2 * SECONDS}
    return tqdm(*args, **kwargs)
