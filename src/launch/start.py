"""Start a script in several processes, as torchrun does: `python start.py [torchrun's flags] SCRIPT [its flags]`.

The error of the process that failed first is the last thing printed: torchrun's own account of a failure, a traceback
of 40 lines that names none, is left out, and what the others said when they lost that process stands above. A process
that a signal ended could not say anything; that is said here. The exit status is that of the process that failed first.
A single process on a single machine is not wrapped at all, unless DeepSpeed or restarts want it so.

`--max_restarts` starts all processes again after a failure, on all nodes, but not after a mistake of the user, which
the script ends with a sentence and would end with again. They see `TORCHELASTIC_RESTART_COUNT`.

SIGTERM and SIGINT are handed on to the processes, which may take their time over them: torchrun itself would end them
by force after half a minute, and call it a failure.
"""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C during the imports; later the processes say what they make of it
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import psutil
from failures import LAUNCH, Failure, read_failures
from torch.distributed import DistError, TCPStore, launcher
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser, run

TOLD = 1  # second in which the other nodes learn of a failure, before this one's store may be gone
SAME_TIME = 5  # seconds between a process's death and the others' errors about it; torchrun itself kills after 30
ELSEWHERE = "a process on another node failed, see there; those on this node were stopped"
handed_on: set[int] = set()  # signals that this process got


def main() -> int:
    args = get_args_parser().parse_args()
    if not args.nproc_per_node.isdecimal() or int(args.nproc_per_node) < 1:
        print(f"GPU_NUM is {args.nproc_per_node!r}; it must be the number of processes, from 1 on", file=sys.stderr)
        return 1
    alone = args.standalone and args.nproc_per_node == "1" and not args.max_restarts
    if alone and "--deepspeed" not in args.training_script_args:
        os.execv(sys.executable, [sys.executable, args.training_script, *args.training_script_args])
    logging.disable()  # torchrun's, in this process alone
    os.environ[LAUNCH] = uuid.uuid4().hex
    launcher.api.LocalElasticAgent = Agent  # type: ignore[misc]
    args.signals_to_handle = "SIGHUP,SIGQUIT"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    place = f"{args.master_addr}:{args.master_port}"
    if args.nnodes not in ("1", "1:1"):  # the latter is the default
        end_while_waiting()
        print(f"node {args.node_rank} of {args.nnodes}: waits for the others at {place}", file=sys.stderr, flush=True)
    try:
        run(args)
    except ChildFailedError as error:
        status, account = explain(error.failures)
        if account:
            print(account, file=sys.stderr)
        return status
    except FailedElsewhere:
        print("\n" + ELSEWHERE, file=sys.stderr)
        return 1
    except DistError as error:
        remedy = "MASTER_ADDR and MASTER_PORT name the first node (NODE_RANK=0) and a port that is free there"
        print(f"the nodes did not meet at {place}; {remedy} ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


class FailedElsewhere(Exception):
    """Processes on another node failed, and are not started again."""


class Agent(LocalElasticAgent):
    """torchrun's, which watches a node's processes. It says why it starts them again, does not where that makes no
    sense, and tells the other nodes, whose processes may take half an hour to miss these."""

    _failures: dict[int, ProcessFailure] = {}  # of this node's processes, by rank

    def _monitor_workers(self, worker_group: Any) -> RunResult:  # torch declares a group's fields as None
        result, store = super()._monitor_workers(worker_group), worker_group.store
        self._failures = result.failures
        restart = f"restart {worker_group.spec.max_restarts - self._remaining_restarts + 1}"
        try:
            if result.state == WorkerState.FAILED:
                if handed_on or any(failure.mistake for failure in first_failures(result.failures)[:1]):
                    self._remaining_restarts = 0
                store.set(restart if self._remaining_restarts else "over", "")
                time.sleep(TOLD if worker_group.group_world_size > 1 else 0)
            elif result.state == WorkerState.HEALTHY and worker_group.group_world_size > 1:
                if store.check(["over"]):
                    raise FailedElsewhere
                if store.check([restart]):
                    return RunResult(WorkerState.UNHEALTHY)  # so all are started again
        except DistError as error:  # the store went with the first node's launcher
            if result.state != WorkerState.FAILED:
                raise FailedElsewhere from error
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self._stop_workers(worker_group)
        if handed_on:
            sys.exit(128 + max(handed_on))
        most = worker_group.spec.max_restarts
        _, account = explain(self._failures)
        lines = [account, f"restart {most - self._remaining_restarts} of {most}"]
        print("", *filter(None, lines), sep="\n", file=sys.stderr, flush=True)
        worker_group.state = WorkerState.STOPPED
        self._initialize_workers(worker_group)

    def _start_workers(self, worker_group: Any) -> dict:
        count = worker_group.spec.max_restarts - self._remaining_restarts
        if count:
            # torchrun would give them the store of the first start, with the addresses of processes that are gone.
            if worker_group.group_rank == 0:
                self._fresh_store = TCPStore(worker_group.master_addr, 0, None, True, wait_for_workers=False)
                worker_group.store.set(f"port {count}", str(self._fresh_store.port))
            worker_group.master_port = int(worker_group.store.get(f"port {count}"))
        started = super()._start_workers(worker_group)
        if handed_on:  # while they were started
            hand_on(max(handed_on), None)
        return started


def first_failures(failures: dict[int, ProcessFailure]) -> list[Failure]:
    """What the processes of this node wrote, in the order of time, unless one that a signal ended failed first. One
    that had written is not meant: it had failed by then, and aborted on its way out."""
    files = {Path(failure.error_file) for failure in failures.values() if Path(failure.error_file).is_file()}
    written = read_failures(min(files).parent.parent) if files else []
    silent = ended_by_others(failures).keys() - {one.rank for one in written}
    ended = [failures[rank] for rank in silent if failures[rank].exitcode < 0]
    if written and any(failure.timestamp < written[0].at + SAME_TIME for failure in ended):
        return []
    return written


def ended_by_others(failures: dict[int, ProcessFailure]) -> dict[int, ProcessFailure]:
    """Those that were not ended by SIGTERM, which is how torchrun stops the others when one has failed."""
    return {rank: failure for rank, failure in failures.items() if -failure.exitcode != signal.SIGTERM}


def explain(failures: dict[int, ProcessFailure]) -> tuple[int, str]:
    """The exit status of a run that failed, and what to print last; nothing if the process itself has just said it.

    Args:
        failures: of this node's processes, by rank; none if those of another node failed.
    """
    if not failures:
        return 1, ELSEWHERE
    if written := first_failures(failures):
        status = next((failures[one.rank].exitcode for one in written if one.rank in failures), 1)
        if not written[0].said:
            return max(status, 1), written[0].message
        account = written[0].message if len({one.message for one in written}) > 1 else ""
        return max(status, 1), f"process {written[0].rank} failed first:\n{account}" if account else ""
    # Of those that failed at the same time, the others lost the one that a signal ended.
    rank, failure = min(
        (ended_by_others(failures) or failures).items(),
        key=lambda item: (item[1].timestamp - SAME_TIME * (item[1].exitcode < 0), item[0]),
    )
    if failure.exitcode > 0:
        return failure.exitcode, ""
    if -failure.exitcode in handed_on:
        return 128 - failure.exitcode, ""
    name = signal.Signals(-failure.exitcode).name
    hint = ": out of memory, if nobody sent it" if name == "SIGKILL" else ""
    return 128 - failure.exitcode, f"process {rank} was ended by {name}{hint}; the others were stopped"


def end_while_waiting() -> None:
    """Have SIGTERM and SIGINT end this process while it waits for other nodes, where Python's handlers do not run."""

    def watch() -> None:
        while byte := os.read(reading, 1):
            if byte[0] in (signal.SIGTERM, signal.SIGINT) and not psutil.Process().children():
                os._exit(128 + byte[0])

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()


def hand_on(number: int, frame) -> None:
    """Send a signal to the processes that were started, which are in sessions of their own; without any, exit."""
    handed_on.add(number)
    processes = psutil.Process().children()
    for process in processes:
        process.send_signal(number)
    if not processes:
        sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
