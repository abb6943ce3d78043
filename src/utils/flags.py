"""Types of command-line flags."""

import argparse
from collections.abc import Callable


def at_least(lowest: int) -> Callable[[str], int]:
    """The `type=` of a flag that takes whole numbers from `lowest` on."""

    def whole(word: str) -> int:
        number = int(word) if word.isdecimal() else lowest - 1
        if number < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {lowest} on, not {word!r}")
        return number

    return whole
