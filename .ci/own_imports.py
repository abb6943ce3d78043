"""Plugin of coverage.py, which must not measure what nobody asks for: imports of other people's packages.

Before Python 3.12 lines are counted by a trace function, which slows all code down, measured or not; most of a test's
time is the import of torch, transformers and trl. Within an import of theirs there is no trace function.
"""

import builtins
import sys
from pathlib import Path

from coverage.plugin import CoveragePlugin

ROOT = Path(__file__).resolve().parents[1]
OWN = {path.stem for folder in ("src", "data", "tests") for path in (ROOT / folder).rglob("*") if path.suffix != ".pyc"}


def coverage_init(registry, options) -> None:
    """Called by coverage.py in every process that it measures."""
    registry.add_configurer(CoveragePlugin())  # it insists on one; this one configures nothing
    usual = builtins.__import__

    def untraced(name, globals=None, locals=None, fromlist=(), level=0):
        trace = sys.gettrace()
        if trace is None or level or name.partition(".")[0] in OWN:
            return usual(name, globals, locals, fromlist, level)
        sys.settrace(None)
        try:
            return usual(name, globals, locals, fromlist, level)
        finally:
            sys.settrace(trace)

    builtins.__import__ = untraced
