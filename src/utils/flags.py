"""Types for the flags of scripts, which use `argparse.ArgumentParser(allow_abbrev=False)`."""

from argparse import ArgumentTypeError
from collections.abc import Callable


def at_least(lowest: int) -> Callable[[str], int]:
    """The `type=` of a flag that takes whole numbers from `lowest` on; others are an `ArgumentTypeError`."""

    def parse(word: str) -> int:
        if not word.removeprefix("-").isdecimal() or int(word) < lowest:
            raise ArgumentTypeError(f"{word!r} is not a whole number from {lowest} on")
        return int(word)

    return parse
