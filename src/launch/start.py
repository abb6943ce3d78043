"""Start a script in several processes, as torchrun does: `python start.py [torchrun's flags] SCRIPT [its flags]`.

What a process says is the last thing printed: torchrun's own account of a failure, a traceback of 40 lines that names
none, is left out. A process that a signal ended could not say anything; that is said here. The exit status is that of
the process that failed first. A single process on a single machine is not wrapped at all, unless DeepSpeed wants it so.

SIGTERM and SIGINT are handed on to the processes, which may take their time over them: torchrun itself would end them
by force after half a minute, and call it a failure.
"""

import logging
import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C during the imports; later the processes say what they make of it
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

handed_on: set[int] = set()  # signals that this process got


def main() -> int:
    args = get_args_parser().parse_args()
    if not args.nproc_per_node.isdecimal() or int(args.nproc_per_node) < 1:
        print(f"GPU_NUM is {args.nproc_per_node!r}; it must be the number of processes, from 1 on", file=sys.stderr)
        return 1
    if args.standalone and args.nproc_per_node == "1" and "--deepspeed" not in args.training_script_args:
        os.execv(sys.executable, [sys.executable, args.training_script, *args.training_script_args])
    logging.disable()  # torchrun's, in this process alone
    args.signals_to_handle = "SIGHUP,SIGQUIT"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        if -failure.exitcode in handed_on:
            return 128 - failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = ": out of memory, if nobody sent it" if name == "SIGKILL" else ""
        print(f"\nprocess {rank} was ended by {name}{hint}; the others were stopped", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


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
