"""Start a script in one process per GPU and supervise them: `python src/run/launch.py SCRIPT [flags]`.

The environment describes the machine: GPU_NUM, NODE_NUM, NODE_RANK, MASTER_ADDR, MASTER_PORT, RESTARTS and CONFIG (the
file of DeepSpeed's settings). The processes get torchrun's variables and RUN_RESTART, the number of the restart. The
first one that fails stops the others, and its status is the launcher's. Standard library only: PyTorch takes seconds.
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

from failures import FOLDER, MISTAKE, Failure, read_failures, recorded, report

GRACE = 30  # seconds from SIGTERM to SIGKILL after a failure
POLL = 0.05  # seconds
LAUNCHER, LIBC, SET_DEATH_SIGNAL = os.getpid(), ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG of prctl(2)
received: list[int] = []  # signals, as the processes are to get them


def read_number(name: str, default: int, least: int = 0, most: int = 65535) -> int:
    """A whole number from the environment; exits if it is not between `least` and `most`."""
    word = os.environ.get(name) or str(default)
    if not word.isdecimal() or not least <= int(word) <= most:
        sys.exit(f"{name} is {word!r}; set it to a whole number from {least} to {most}")
    return int(word)


def count_gpus() -> int:
    code = "import torch; print(torch.cuda.device_count())"
    seen = subprocess.check_output([sys.executable, "-c", code], text=True, start_new_session=True)
    return int(seen) or sys.exit("PyTorch sees no GPU; pass --use_cpu true to train a small model on the CPU")


def prepare_child() -> None:
    """Before exec: have the system send SIGTERM when the launcher dies, and leave SIGHUP to the launcher."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if sys.platform == "linux":
        LIBC.prctl(SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != LAUNCHER:  # it died before
            os._exit(1)


def run(command: list[str], environments: dict[int, dict]) -> list[Failure]:
    """Run a process per rank; forward signals; stop all when one fails. Returns the failures in order of time."""
    running, failed, forwarded, deadline, polled = {}, {}, 0, float("inf"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for rank, added in environments.items():
            env = os.environ | {name: str(value) for name, value in added.items()} | {FOLDER: folder}
            running[rank] = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=prepare_child)
        while running:
            time.sleep(POLL)
            previous, polled = polled, time.monotonic()
            for rank in [rank for rank, process in running.items() if process.poll() is not None]:
                if status := running.pop(rank).returncode:
                    failed[rank] = Failure(previous, rank, status)  # before errors of those that lost this process
            to_send = received[forwarded:]
            forwarded += len(to_send)
            if failed and deadline == float("inf"):
                deadline = time.monotonic() + GRACE
                if not received:  # a second one would interrupt a save
                    to_send = [signal.SIGTERM]
            for process in running.values():
                for number in to_send:
                    process.send_signal(number)
                if time.monotonic() > deadline:
                    os.killpg(process.pid, signal.SIGKILL)
        written = read_failures(folder)
    return sorted(written.get(rank, failure) for rank, failure in failed.items())


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there are processes
    script, *flags = sys.argv[1:] or sys.exit(__doc__)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--use_cpu", "--use-cpu", nargs="?", const="true", default="false")
    parser.add_argument("--deepspeed", nargs="?")
    given, _ = parser.parse_known_args(flags)
    on_cpu = given.use_cpu.lower() in ("true", "t", "yes", "y", "1")
    config = os.environ.get("CONFIG", "" if on_cpu else "conf/ds_zero2.json")
    if config and not os.path.isfile(config):
        sys.exit(f"CONFIG is {config!r}, which is no file; name one of conf/*.json")
    restarts, nodes = read_number("RESTARTS", 0), read_number("NODE_NUM", 1, least=1)
    node, port = read_number("NODE_RANK", 0, most=nodes - 1), read_number("MASTER_PORT", 32777 if nodes > 1 else 0)
    host = "127.0.0.1" if nodes == 1 else os.environ.get("MASTER_ADDR") or sys.exit("NODE_NUM > 1 requires MASTER_ADDR")
    count = read_number("GPU_NUM", 1 if on_cpu or given.help or os.environ.get("GPU_NUM") else count_gpus(), least=1)
    command = [sys.executable, script, *(["--deepspeed", config] if config else []), *flags]
    if given.help or (nodes * count == 1 and not (config or given.deepspeed or restarts)):
        os.execv(sys.executable, command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup; a terminal that closes may send it twice
        signal.signal(signal.SIGHUP, lambda *_: None if received else received.append(signal.SIGTERM))
    shared = dict(WORLD_SIZE=nodes * count, LOCAL_WORLD_SIZE=count, GROUP_RANK=node, MASTER_ADDR=host)
    if count > 1:
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", 1)  # torchrun's default
    for restart in range(restarts + 1):
        with socket.create_server(("", 0)) as free:
            shared |= dict(RUN_RESTART=restart, MASTER_PORT=port + restart if port else free.getsockname()[1])
        ranks = {node * count + i: shared | dict(RANK=node * count + i, LOCAL_RANK=i) for i in range(count)}
        if not (failures := run(command, ranks)):
            return 0
        report(failures, received)
        status = failures[0].status
        if received or status == MISTAKE or restart == restarts:
            break
        print(f"restart {restart + 1} of {restarts}", file=sys.stderr, flush=True)
    return status if status > 0 else 128 - status


if __name__ == "__main__":
    with recorded():
        sys.exit(main())
