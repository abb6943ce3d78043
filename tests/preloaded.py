"""An interpreter that has torch, transformers and the like loaded: what tests start is forked from it, which spares each
of a run's processes ten seconds. Not a test itself.

    python preloaded.py FOLDER    prints `ready` when FOLDER/python is there, which first on PATH stands for the interpreter

A process that is forked gets the arguments, variables, folder, streams and signals of the one that asks for it, has
nothing of the project imported, and ends with its status; so do those that start.py or torchrun start. What no such
process can show is left to tests that do without: what an interpreter does before a script and after it.
"""

import gc
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = sys.path[1:]  # without this script's folder
sys.path[:0] = [str(ROOT / "src")]

# ruff: noqa: E402, F401
import deepspeed
import matplotlib.pyplot
import scipy.stats
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from torch.distributed.run import run as torchrun

import test_mmau
import train
import train_sft

# What stands for the interpreter: it hands over all that it has, and waits.
STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys
umask = os.umask(0)
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
command = dict(argv=sys.argv[1:], env=dict(os.environ), folder=os.getcwd(), umask=umask)
socket.send_fds(server, [b"!"], [0, 1, 2])
server.sendall(json.dumps(command).encode() + b"\\n")
answer = server.makefile()
process = int(answer.readline())
def hand_on(number, frame):
    try:
        os.kill(process, number)
    except ProcessLookupError:  # it has ended meanwhile
        pass
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, hand_on)
status = int(answer.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


class Forked:
    """What torchrun's handler expects of a `subprocess.Popen`."""

    def __init__(self, argv: list[str], env: dict[str, str]):
        self.returncode = None
        self.pid = fork(lambda: run_python(argv[1:], env))

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.02)
        return self.returncode


class Replaced(BaseException):
    """By another script, as by `os.execv`."""


def replace(path: str, argv: list[str]):
    raise Replaced(argv[1:])


def fork(run: Callable[[], None]) -> int:
    """A child in a session of its own that ends as a program whose main function `run` is; its pid."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        os.closerange(3, 1024)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        logging.disable(logging.NOTSET)
        run()
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_python(argv: list[str], env: dict[str, str]) -> None:
    """What `python ARGV` does: `[-u] SCRIPT ...`, `-m MODULE ...` or `-c CODE ...`."""
    os.environ.clear()
    os.environ.update(env)
    forget_project()
    added = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    what, *rest = argv[1:] if argv[0] == "-u" else argv
    sys.path[:] = ["" if what in ("-c", "-m") else str(Path(what).resolve().parent), *added, *PATHS]
    sys.modules.pop("sitecustomize", None)
    for folder in added:
        if (custom := Path(folder, "sitecustomize.py")).is_file():
            runpy.run_path(str(custom))
    try:
        if what == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif what == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [what, *rest]
            runpy.run_path(str(Path(what).resolve()), run_name="__main__")
    except Replaced as replaced:
        (argv,) = replaced.args
    else:
        return
    run_python(argv, dict(os.environ))


def forget_project() -> None:
    """Have a script import its own modules, of whichever copy of the project it is."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__" and not file.startswith((sys.prefix, sys.base_prefix)):
            del sys.modules[name]


def serve(connection: socket.socket) -> None:
    """Run what the other end asks for, and tell it the process's id, then its status."""
    streams = socket.recv_fds(connection, 1, 3)[1]
    command = json.loads(connection.makefile().readline())
    for stream, descriptor in enumerate(streams):
        os.dup2(descriptor, stream)
    os.chdir(command["folder"])
    os.umask(command["umask"])
    process = fork(lambda: run_python(command["argv"], command["env"]))
    connection.sendall(f"{process}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    connection.sendall(f"{status}\n".encode())


def main(folder: Path) -> None:
    forget_project()
    SubprocessHandler._popen = lambda self, args, env: Forked(args, env)
    os.execv = replace
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(100)
    (folder / "python").write_text(STAND_IN.format(python=sys.executable, address=str(folder / "socket")))
    (folder / "python").chmod(0o755)
    gc.collect()
    gc.freeze()  # collections in forked processes would copy every page
    print("ready", flush=True)
    serving: set[int] = set()
    while True:
        connection, _ = listener.accept()
        serving = {process for process in serving if not os.waitpid(process, os.WNOHANG)[0]}
        if not (process := os.fork()):
            listener.close()
            serve(connection)
            os._exit(0)
        serving.add(process)
        connection.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
