"""Faults in the processes of a run. test_faults.py writes a `sitecustomize.py` with which each process calls `arm` before
its script."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path


def arm() -> None:
    """Prepare the fault in the variable FAULT, if it is for this process's rank and the run's first start: `{"what": ...,
    "step": N}` for `strike` in step N, `{"what": "kill launcher"}` at once, or `{"copies": PATH, "out": PATH}` for
    `copy_before_operations`. Leave the process's id in PIDS."""
    if "RANK" not in os.environ:  # the launcher
        return
    Path(os.environ["PIDS"], str(os.getpid())).touch()
    fault, rank = json.loads(os.environ["FAULT"]), int(os.environ["RANK"])
    if fault.get("rank", rank) != rank or os.environ["RUN_RESTART"] != "0":
        return
    if "step" in fault:
        os.environ["STRIKE"] = json.dumps(fault)  # for the reward
    elif "what" in fault:
        strike(fault)
    elif "copies" in fault:
        copy_before_operations(Path(fault["out"]), Path(fault["copies"]))


def strike(fault: dict) -> None:
    """Called by a reward in the middle of a step, or by `arm` at once."""
    launcher, what = os.getppid(), fault["what"]
    if what == "raise":
        raise RuntimeError("the reward broke")
    if what == "kill launcher":
        os.kill(launcher, signal.SIGKILL)
    elif what == "kill all":  # the launcher first, before it can react
        import psutil

        others = [one.pid for one in psutil.Process(launcher).children() if one.pid != os.getpid()]
        for number in (launcher, *others, os.getpid()):
            os.kill(number, signal.SIGKILL)
    elif what == "remove clips":
        for path in fault["paths"]:
            Path(path).unlink()
    elif what == "nan loss":
        from trainer.grpo_trainer import AudioGRPOTrainer as trained

        compute_loss = trained.compute_loss

        def once(self, *args, **kwargs):
            trained.compute_loss = compute_loss
            return compute_loss(self, *args, **kwargs) * float("nan")

        trained.compute_loss = once
    elif what == "fill disk":

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
    elif what in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, what))
    else:
        for name in what.split():
            os.kill(launcher, getattr(signal, name))
            time.sleep(1)


def copy_before_operations(out: Path, copies: Path) -> None:
    """Copy the output folder before every operation on files during a save: what a process killed there would leave."""
    import torch

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

    for owner, name in (
        (os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (Path, "unlink"), (shutil, "rmtree"),
        (torch, "save"), (shutil, "copyfile"), (Path, "write_text"), (Path, "replace"),
    ):  # fmt: skip
        watch(owner, name)
