"""Types of command-line flags."""

import argparse
from collections.abc import Callable


def at_least(lowest: int) -> Callable[[str], int]:
    """The `type=` of a flag that takes whole numbers from `lowest` on."""

    def number(word: str) -> int:
        if (value := int(word)) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {lowest} on, not {word!r}")
        return value

    return number
