"""Run a launcher or script as a person would, in a subprocess, on the interpreter that runs the tests."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def run(
    *command: str | Path, cwd: Path = ROOT, timeout: int = 400, check: bool = True, **environment
) -> subprocess.CompletedProcess:
    """Run `command` with this interpreter's environment active; `environment` is added. Output as text, both streams."""
    bin_folder = Path(sys.executable).parent
    variables = os.environ | {
        "VIRTUAL_ENV": str(bin_folder.parent),
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # DeepSpeed's compiled operators hold paths of the environment they were built in.
        "TORCH_EXTENSIONS_DIR": str(bin_folder.parent / "torch_extensions"),
    }
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=variables | {key: str(value) for key, value in environment.items()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert not check or process.returncode == 0, f"{command} failed:\n{process.stdout[-6000:]}"
    return process


def free_port() -> int:
    """A port nobody listens on, for runs side by side."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
