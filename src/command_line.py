"""Command lines whose mistakes are answered in one sentence: flags are exact, a near miss is suggested, a bad value is
named with its flag and what is expected there. Leaves out which flags there are; needs the standard library only.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NoReturn

EXPECTED = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


class ExactFlags:
    """Mixin, to stand before `argparse.ArgumentParser` or a class that is built on it. What it cannot use, it says on
    standard error, and the exit status is 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """As argparse's, but that there is nothing unknown: it is refused here, for whoever parses."""
        args = list(sys.argv[1:] if args is None else args)
        known = self._option_string_actions
        # Before argparse would say of a misspelt flag that the right one is missing. With a space it takes it for text.
        if wrong := [w for w in args if w[:2] == "--" != w and " " not in w and w.partition("=")[0] not in known]:
            self.refuse(wrong)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return namespace, []

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Say which word is no flag, and which ones are like it."""
        word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        if not word.startswith("-"):
            self.error(f"{word!r} belongs to no flag")
        similar = self.similar_flags(word)
        self.error(f"there is no flag {word}" + (f"; did you mean {' or '.join(similar)}?" if similar else ""))

    def similar_flags(self, word: str) -> list[str]:
        """At most three flags that a word may stand for, those that it abbreviates first."""
        flags = [option for option in self._option_string_actions if not re.match(r"--?\w+-", option)]
        word = "--" + word.lstrip("-").replace("-", "_")
        if word in flags:
            return [word]
        begun = [flag for flag in flags if flag.startswith(word)]
        return list(dict.fromkeys([*begun, *get_close_matches(word, flags, n=3, cutoff=0.75)]))[:3]

    def _get_value(self, action: argparse.Action, word: str):
        try:
            return super()._get_value(action, word)
        except argparse.ArgumentError as error:
            expected = getattr(action.type, "expected", EXPECTED.get(getattr(action.type, "__name__", "")))
            raise wrong_value(action, word, f"expected {expected}" if expected else error.message) from error

    def _check_value(self, action: argparse.Action, value) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise wrong_value(action, value, f"expected one of {', '.join(choices)}")

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (-[^:/ ]+)[^: ]*: expected ", r"\1: expected ", message)
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


class ArgumentParser(ExactFlags, argparse.ArgumentParser):
    """argparse's, with exact flags."""


def wrong_value(action: argparse.Action, value, expected: str) -> argparse.ArgumentError:
    """The error that says `--flag VALUE: expected this`."""
    name = action.option_strings[0] if action.option_strings else action.dest
    return argparse.ArgumentError(None, f"{name} {value}: {expected}")


def at_least(lowest: int) -> Callable[[str], int]:
    """The `type=` of a flag that takes whole numbers from `lowest` on."""

    def whole(word: str) -> int:
        if (number := int(word)) < lowest:
            raise ValueError
        return number

    whole.expected = f"a whole number from {lowest} on"
    return whole
