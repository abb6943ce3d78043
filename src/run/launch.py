"""Start a script in one process per GPU and supervise them: `python src/run/launch.py SCRIPT [flags]`.

The environment has GPU_NUM, NODE_NUM, NODE_RANK, MASTER_ADDR, MASTER_PORT, RESTARTS, and CONFIG, a file for DeepSpeed.
Processes get torchrun's variables and RUN_RESTART. Standard library only: importing PyTorch takes seconds.
"""

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager

GRACE, MISTAKE = 30, 2  # seconds from SIGTERM to SIGKILL; exit status after a user's mistake, as argparse's
received: list[int] = []  # signals, as the processes are to get them


@contextmanager
def recorded():
    """Around a script's main function. A `SystemExit` with a text is a user's mistake: the launcher, if there is one,
    prints it once for all processes. Tracebacks of other exceptions are recorded as well."""
    path, rank = os.environ.pop("RUN_FAILURES", ""), os.environ.get("RANK")
    try:
        yield
    except (Exception, SystemExit) as error:
        mistake = isinstance(error, SystemExit) and isinstance(error.code, str)
        if path and (mistake or isinstance(error, Exception)):
            line = json.dumps([MISTAKE, rank, str(error)] if mistake else [1, rank, traceback.format_exc()]) + "\n"
            os.write(os.open(path, os.O_WRONLY | os.O_APPEND), line.encode())  # at once: others are writing, too
        elif mistake:
            print(error, file=sys.stderr)
        if mistake:
            raise SystemExit(MISTAKE) from None
        raise


def run(command: list[str], places: list[dict]) -> int:
    """Run a process per place; the first one that fails stops the others. Returns its status (-n for signal n)."""
    running, failed, stopped, deadline = {}, [], False, float("inf")
    launcher, linux = os.getpid(), sys.platform == "linux"  # prctl asks for SIGTERM (15) when the launcher dies
    prepare = (lambda: ctypes.CDLL(None).prctl(1, 15) or os.getppid() == launcher or os._exit(1)) if linux else None
    with tempfile.NamedTemporaryFile() as file:
        hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # of the processes: they leave it to the launcher
        for place in places:
            env = os.environ | {name: str(value) for name, value in place.items()} | {"RUN_FAILURES": file.name}
            running[env["RANK"]] = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=prepare)
        if hangup != signal.SIG_IGN:  # as under nohup; a terminal that closes may send it twice
            signal.signal(signal.SIGHUP, lambda *_: received.extend([] if received else [signal.SIGTERM]))
        while running:
            time.sleep(0.05)
            ended = [rank for rank, process in running.items() if process.poll() is not None]
            failed += sorted((status, rank) for rank in ended if (status := running.pop(rank).returncode))
            deadline = min(deadline, time.monotonic() + GRACE) if failed else deadline
            stop = received[0] if received else signal.SIGTERM if failed else None
            for process in running.values():
                if len(received) > 1 or time.monotonic() > deadline:
                    os.killpg(process.pid, signal.SIGKILL)
                elif stop and not stopped:
                    process.send_signal(stop)
            stopped = bool(stop)
        records = list(map(json.loads, file))
    status, rank = failed[0] if failed else (0, "")
    if any(rank == other for _, other, _ in records):  # of those that recorded why, the first may end last
        status, rank, text = records[0]
        if status != MISTAKE and len(records) > 1:
            print(f"process {rank} failed first:\n{text.rstrip()}", file=sys.stderr)
    elif status < 0 and not received:
        name = "SIGKILL (out of memory, if nobody sent it)" if status == -9 else signal.Signals(-status).name
        print(f"process {rank} was ended by {name}; the others were stopped", file=sys.stderr)
    print(*dict.fromkeys(text + "\n" for kind, _, text in records if kind == MISTAKE), sep="", end="", file=sys.stderr)
    return status


def main() -> int:
    def number(name: str, default: int, least: int = 0, most: int = 65535) -> int:
        word = os.environ.get(name) or str(default)
        valid = word.isdecimal() and least <= int(word) <= most
        return int(word) if valid else sys.exit(f"{name} is {word!r}; set it to a whole number from {least} to {most}")

    script, *flags = sys.argv[1:] or sys.exit(__doc__)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--use_cpu", "--use-cpu"), ("--deepspeed",), ("--help", "-h")):
        parser.add_argument(*names, nargs="?", const="true", default="")
    given, _ = parser.parse_known_args(flags)
    on_cpu = given.use_cpu.lower() in ("true", "t", "yes", "y", "1")
    config = os.environ.get("CONFIG", "" if on_cpu else "conf/ds_zero2.json")
    if config and not os.path.isfile(config):
        sys.exit(f"CONFIG is {config!r}, which is no file; name one of conf/*.json")
    restarts, nodes, count = number("RESTARTS", 0), number("NODE_NUM", 1, least=1), number("GPU_NUM", 1, least=1)
    node, port = number("NODE_RANK", 0, most=nodes - 1), number("MASTER_PORT", 32777 if nodes > 1 else 0)
    host = "127.0.0.1" if nodes == 1 else os.environ.get("MASTER_ADDR") or sys.exit("NODE_NUM > 1 requires MASTER_ADDR")
    if not (os.environ.get("GPU_NUM") or on_cpu or given.help):
        count = int(subprocess.check_output([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]))
        count = count or sys.exit("PyTorch sees no GPU; pass --use_cpu true to train a small model on the CPU")
    command = [sys.executable, script, *(["--deepspeed", config] if config else []), *flags]
    if given.help or (nodes * count == 1 and not (config or given.deepspeed or restarts)):
        os.execv(sys.executable, command)
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, lambda sent, _: received.append(sent))
    threads = {} if count == 1 else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1)}  # torchrun's default
    shared = dict(WORLD_SIZE=nodes * count, LOCAL_WORLD_SIZE=count, GROUP_RANK=node, MASTER_ADDR=host, **threads)
    for restart in range(restarts + 1):
        with socket.create_server(("", 0)) as free:  # another port: nobody meets a process of an earlier start
            shared |= dict(RUN_RESTART=restart, MASTER_PORT=port + restart if port else free.getsockname()[1])
        status = run(command, [shared | dict(RANK=node * count + i, LOCAL_RANK=i) for i in range(count)])
        if received or status in (0, MISTAKE) or restart == restarts:
            break
        print(f"restart {restart + 1} of {restarts}", file=sys.stderr, flush=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    with recorded():
        sys.exit(main())
