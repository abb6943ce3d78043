"""Text of models and data, made safe to print."""

import re

# Characters that control a terminal, or reorder or hide the text around them, or that UTF-8 cannot encode.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with control characters other than tabs and newlines replaced by their names."""
    return CONTROLS.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
