"""Run src/launch/start.py many times without loading torch and transformers anew: python preloaded.py, then a line of
JSON on standard input for each command. Not a test itself: test_faults.py uses it.

    {"argv": [...], "env": {...}, "log": PATH}    start.py with these arguments, in a session of its own -> its pid
    {"wait": PID}                                 -> its exit status, as a shell has it

The process forks where a shell would start the launcher, and where torchrun would start a script; all that these then
do is the project's own code. A fault in FAULT (see `strike`) befalls the process whose RANK it names.
"""

import errno
import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "src" / "launch")]

# ruff: noqa: E402, F401
import deepspeed
import psutil
import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler
from transformers import TrainerCallback

import startup
import trainer.grpo_trainer

startup.PlotCurves = TrainerCallback  # drawing takes longer than a run

SAVES = (
    (os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (Path, "unlink"), (shutil, "rmtree"),
    (torch, "save"), (shutil, "copyfile"), (Path, "write_text"), (Path, "replace"), (Path, "rmdir"),
)  # fmt: skip


class Forked:
    """What torchrun's handler expects of a `subprocess.Popen`."""

    def __init__(self, argv: list[str], env: dict[str, str]):
        self.returncode = None
        self.pid = fork(lambda: run_script(argv, env))

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


def fork(run) -> int:
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


def run_script(argv: list[str], env: dict[str, str]) -> None:
    """A script of the project, as torchrun starts it: `python -u script.py ...`."""
    script = next(i for i, word in enumerate(argv) if word.endswith(".py"))
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(argv[script:])
    Path(env["PIDS"], str(os.getpid())).touch()
    fault = json.loads(env["FAULT"])
    if fault.get("rank") in (None, int(env["RANK"])) and env["TORCHELASTIC_RESTART_COUNT"] == "0":
        arm(fault)
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


def arm(fault: dict) -> None:
    """Have a fault befall this process: `{"what": ..., "step": N}` of `strike` in the middle of step N, or
    `{"copies": PATH, "out": PATH}` of `copy_before_operations`."""
    if "step" in fault:
        os.environ["STRIKE"] = json.dumps(fault)  # which a reward reads
    elif "copies" in fault:
        copy_before_operations(Path(fault["out"]), Path(fault["copies"]))


def strike(fault: dict) -> None:
    """Called by a reward, which is in the middle of a step."""
    launcher, what = os.getppid(), fault["what"]
    if what == "raise":
        raise RuntimeError("the reward broke")
    if what == "kill launcher":
        os.kill(launcher, signal.SIGKILL)
    elif what == "kill all":  # the launcher first, lest it did anything about it
        processes = psutil.Process(launcher).children()
        for number in [launcher, *(one.pid for one in processes if one.pid != os.getpid()), os.getpid()]:
            os.kill(number, signal.SIGKILL)
    elif what == "remove clips":
        for path in fault["paths"]:
            Path(path).unlink()
    elif what == "break loader":
        import dataset.encode

        def broken(*args, **kwargs):
            raise RuntimeError("the loader broke")

        dataset.encode.load_audio = broken
    elif what == "nan loss":
        trained = trainer.grpo_trainer.AudioGRPOTrainer
        compute_loss = trained._compute_loss

        def once(self, *args, **kwargs):
            trained._compute_loss = compute_loss
            return compute_loss(self, *args, **kwargs) * float("nan")

        trained._compute_loss = once
    elif what == "fill disk":

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
    elif what in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, what))
    else:
        for name in what.split():
            os.kill(launcher, getattr(signal, name))
            time.sleep(1)  # a second one, not the same on another way


def copy_before_operations(out: Path, copies: Path) -> None:
    """Copy the output folder before every operation on files in the saves: what a process killed there leaves."""
    copying = []

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            if out.is_dir() and not copying:
                copying.append(True)
                shutil.copytree(out, copies / f"{len(list(copies.iterdir())):03}")
                copying.clear()
            return function(*args, **kwargs)

        setattr(owner, name, watched)

    for owner, name in SAVES:
        watch(owner, name)


def launch(command: dict) -> None:
    os.environ.update(command["env"])
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.argv = ["start.py", *command["argv"]]
    SubprocessHandler._popen = lambda self, args, env: Forked(args, env)
    runpy.run_path(str(ROOT / "src" / "launch" / "start.py"), run_name="__main__")


def main() -> None:
    sys.modules["preloaded"] = sys.modules["__main__"]  # where a reward finds `strike` while a script is `__main__`
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            status = os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1])
            print(status if status >= 0 else 128 - status, flush=True)
        else:
            print(fork(lambda: launch(command)), flush=True)  # noqa: B023


if __name__ == "__main__":
    main()
