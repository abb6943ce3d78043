"""Start a script in one process per GPU and supervise them: `python src/run/launch.py SCRIPT [flags]`.

The environment describes the machine: GPU_NUM, NODE_NUM, NODE_RANK, MASTER_ADDR, MASTER_PORT, RESTARTS, and CONFIG, a
file of DeepSpeed's settings. The processes get torchrun's variables, and RUN_RESTART: the number of the restart. The
first one that fails stops the others, and its status is the launcher's. Standard library only: PyTorch takes seconds.
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
from pathlib import Path

GRACE, POLL = 30, 0.05  # seconds: from SIGTERM to SIGKILL after a failure; between two looks at the processes
MISTAKE = 2  # exit status after a user's mistake, as argparse's: another try would end the same way
FOLDER = "RUN_FAILURES"  # variable: where processes record why they fail
LAUNCHER = os.getpid()
received: list[int] = []  # signals, as the processes are to get them


@contextmanager
def recorded():
    """Around a script's main function. A `SystemExit` with a text is a user's mistake: the launcher, if there is one,
    prints it once for all processes. Tracebacks of other exceptions are recorded as well."""
    folder, rank = os.environ.pop(FOLDER, ""), os.environ.get("RANK", "0")
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else None
        mistake = isinstance(code, str)
        if folder and (mistake or isinstance(error, Exception)):
            record = time.monotonic(), rank, MISTAKE if mistake else 1, code if mistake else traceback.format_exc()
            partial = Path(folder, "partial" + rank)
            partial.write_text(json.dumps(record))  # the launcher may stop this process meanwhile
            partial.rename(Path(folder, rank))
        elif mistake:
            print(code, file=sys.stderr)
        if mistake:
            raise SystemExit(MISTAKE) from None
        raise


def prepare_child() -> None:
    """Before exec: have the system send SIGTERM when the launcher dies, and leave SIGHUP to the launcher."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != LAUNCHER:  # it died before
            os._exit(1)


def run(command: list[str], environments: dict[str, dict]) -> list[list]:
    """Run a process per rank, forward signals, stop all when one fails; a second signal kills them. Returns time, rank,
    status (-n for signal n) and recorded text of every failure, the first one first."""
    running, failed, forwarded, deadline = {}, {}, 0, float("inf")
    with tempfile.TemporaryDirectory() as folder:
        for rank, added in environments.items():
            env = os.environ | {name: str(value) for name, value in added.items()} | {FOLDER: folder}
            running[rank] = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=prepare_child)
        looked = time.monotonic()
        while running:
            time.sleep(POLL)
            before, looked = looked, time.monotonic()
            for rank in [rank for rank, process in running.items() if process.poll() is not None]:
                if status := running.pop(rank).returncode:
                    record = Path(folder, rank)
                    failed[rank] = json.loads(record.read_text()) if record.exists() else [before, rank, status, ""]
            to_send, forwarded = received[forwarded : forwarded + 1], len(received)
            if failed and deadline == float("inf"):
                deadline, to_send = time.monotonic() + GRACE, to_send or ([] if received else [signal.SIGTERM])
            for process in running.values():
                if time.monotonic() > deadline or len(received) > 1:
                    os.killpg(process.pid, signal.SIGKILL)
                elif to_send:
                    process.send_signal(to_send[0])
    return sorted(failed.values())


def report(failures: list[list]) -> None:
    """Print what the processes could not print, and repeat the first of several tracebacks."""
    _, rank, status, text = failures[0]
    if status < 0 and not received:
        name = "SIGKILL (out of memory, if nobody sent it)" if status == -9 else signal.Signals(-status).name
        print(f"process {rank} was ended by {name}; the others were stopped", file=sys.stderr)
    elif status != MISTAKE and sum(bool(failure[3]) for failure in failures) > 1:
        print(f"process {rank} failed first:\n{text.rstrip()}", file=sys.stderr)
    for sentence in dict.fromkeys(text for *_, status, text in failures if status == MISTAKE and text):
        print(sentence, file=sys.stderr)


def number(name: str, default: int, least: int = 0, most: int = 65535) -> int:
    """A whole number from the environment; exits if it is out of bounds."""
    word = os.environ.get(name) or str(default)
    if not word.isdecimal() or not least <= int(word) <= most:
        sys.exit(f"{name} is {word!r}; set it to a whole number from {least} to {most}")
    return int(word)


def main() -> int:
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
    restarts, nodes = number("RESTARTS", 0), number("NODE_NUM", 1, least=1)
    node = number("NODE_RANK", 0, most=nodes - 1)
    host = "127.0.0.1" if nodes == 1 else os.environ.get("MASTER_ADDR") or sys.exit("NODE_NUM > 1 requires MASTER_ADDR")
    count, port = number("GPU_NUM", 1, least=1), number("MASTER_PORT", 32777 if nodes > 1 else 0)
    if not (os.environ.get("GPU_NUM") or on_cpu or given.help):
        count = int(subprocess.check_output([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]))
        count = count or sys.exit("PyTorch sees no GPU; pass --use_cpu true to train a small model on the CPU")
    command = [sys.executable, script, *(["--deepspeed", config] if config else []), *flags]
    if given.help or (nodes * count == 1 and not (config or given.deepspeed or restarts)):
        os.execv(sys.executable, command)
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, lambda sent, _: received.append(sent))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup; a terminal that closes may send it twice
        signal.signal(signal.SIGHUP, lambda *_: received.extend([] if received else [signal.SIGTERM]))
    shared = dict(WORLD_SIZE=nodes * count, LOCAL_WORLD_SIZE=count, GROUP_RANK=node, MASTER_ADDR=host)
    if count > 1:
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", 1)  # torchrun's default
    for restart in range(restarts + 1):
        with socket.create_server(("", 0)) as free:  # another port: nobody meets a process of an earlier start
            shared |= dict(RUN_RESTART=restart, MASTER_PORT=port + restart if port else free.getsockname()[1])
        ranks = {str(node * count + i): shared | dict(RANK=node * count + i, LOCAL_RANK=i) for i in range(count)}
        if not (failures := run(command, ranks)):
            return 0
        report(failures)
        status = failures[0][2]
        if received or status == MISTAKE or restart == restarts:
            break
        print(f"restart {restart + 1} of {restarts}", file=sys.stderr, flush=True)
    return status if status > 0 else 128 - status


if __name__ == "__main__":
    with recorded():
        sys.exit(main())
