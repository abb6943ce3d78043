"""Run a launcher or script as a user does, in a subprocess, with the interpreter that runs the tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT


def run(
    *command: str | Path, cwd: Path = ROOT, timeout: int = 400, check: bool = True, **added
) -> subprocess.CompletedProcess:
    """Run `command` with this interpreter's environment active; `added` are variables. Output as text, both streams."""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**added),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert not check or process.returncode == 0, f"{command} failed:\n{process.stdout[-6000:]}"
    return process


def skip_without_compiler(engine: str) -> None:
    """Skip a test of a DeepSpeed engine where its operators cannot be compiled; `engine` is empty without DeepSpeed."""
    if engine and not shutil.which("g++"):
        pytest.skip("DeepSpeed compiles its CPU operators and needs g++")


def environment(**added) -> dict[str, str]:
    """The variables of a command that runs in this interpreter's environment, with those `added`."""
    bin_folder = Path(sys.executable).parent
    own = {
        "VIRTUAL_ENV": str(bin_folder.parent),
        "PATH": os.pathsep.join([str(bin_folder), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",
        # DeepSpeed's compiled operators hold paths of the environment they were built in.
        "TORCH_EXTENSIONS_DIR": str(bin_folder.parent / "torch_extensions"),
    }
    return os.environ | own | {key: str(value) for key, value in added.items()}


def free_port() -> int:
    """A free port."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
