"""Faults that befall processes of a run, by variables of theirs. Not a test itself: test_faults.py uses it, by a
`sitecustomize.py` in which each process calls `arm` before its script."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import torch

SAVES = (
    (os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (Path, "unlink"), (shutil, "rmtree"),
    (torch, "save"), (shutil, "copyfile"), (Path, "write_text"), (Path, "replace"), (Path, "rmdir"),
)  # fmt: skip


def arm() -> None:
    """Have the fault in FAULT befall this process, if it is one that the launcher started, of the rank that it names if
    any: `{"what": ..., "step": N}` of `strike` in the middle of step N, or `{"copies": PATH, "out": PATH}` of
    `copy_before_operations`. Leaves the process's id in PIDS."""
    if "RANK" not in os.environ:
        return
    Path(os.environ["PIDS"], str(os.getpid())).touch()
    fault, rank = json.loads(os.environ["FAULT"]), int(os.environ["RANK"])
    if fault.get("rank", rank) != rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
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
        from trainer.grpo_trainer import AudioGRPOTrainer as trained

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
