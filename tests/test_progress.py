"""Bars on a terminal, plain lines elsewhere; libraries that talk about themselves."""

import io
import subprocess
import sys

import pytest

from conftest import ROOT
from dataset import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_only_a_terminal_gets_carriage_returns(monkeypatch, stream):
    monkeypatch.setattr(progress, "SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", shown := stream())
    for _ in progress.progress(range(5), desc="asked", unit=" questions"):
        pass
    lines = shown.getvalue().splitlines()
    assert ("\r" in shown.getvalue()) == (stream is Terminal)
    assert "asked: 100%" in lines[-1] and "5/5" in lines[-1]


def test_short_work_says_nothing_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    assert list(progress.progress(range(5))) == [0, 1, 2, 3, 4] and not shown.getvalue()


def test_chatter_is_silenced_and_warnings_are_not():
    """In a process of its own, since it is for good."""
    code = """
import logging, sys, warnings
sys.path.insert(0, "src")
from quiet import silence_libraries
silence_libraries()
logging.basicConfig(stream=sys.stdout)
warnings.warn("this name is deprecated", FutureWarning)
warnings.warn("look here")
logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU")
logging.getLogger("DeepSpeed").warning("the clock is wrong")
from transformers.utils.logging import tqdm
list(tqdm([1], desc="Writing model shards"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    assert "look here" in said and "the clock is wrong" in said
    assert not any(word in said for word in ("deprecated", "Setting accelerator", "shards")), said
