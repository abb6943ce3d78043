"""How a run ends before its time. A signal ends it without loss: all processes finish the step, save, and go home
together.

SIGTERM (a cluster's warning) and SIGINT (Ctrl-C) reach processes at different moments, so they agree once a step on
whether any has got one. A second signal ends a process at once, also one that waits for another in a collective, where
Python's own handlers do not run. Before the first step a signal ends it as usual, since there is nothing to save.
"""

import os
import signal
import threading
import time

import torch
from transformers import TrainerCallback

ONE_SIGNAL = 0.5  # seconds: Slurm sends a signal to all processes of a job, and the launcher hands on its own


class RunEnded(Exception):
    """A run cannot go on, for a reason that is its user's to mend: the message says what is saved, and how to go on.

    Args:
        everywhere: all processes have agreed, and raise it at the same place.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class StopOnSignal(TrainerCallback):
    """For `Trainer(callbacks=[...])`; `stopped` is the signal's name, once all processes have agreed to stop."""

    def __init__(self):
        self.received: int = 0  # by this process
        self.stopped: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_the_second, args=(reading,), daemon=True).start()

    def _receive(self, number: int, frame) -> None:
        self.received = self.received or number

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(self.received, device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        if received:
            self.stopped = signal.Signals(int(received)).name
            # There may be seconds left: for the checkpoint, not for an evaluation.
            control.should_training_stop, control.should_save, control.should_evaluate = True, True, False
        return control

    def on_train_end(self, args, state, control, **kwargs):
        signal.set_wakeup_fd(-1)
        os.close(self.writing)
        for number, usual in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            signal.signal(number, usual)


def _end_at_the_second(reading: int) -> None:
    """Read the numbers of signals as they come; the thread's end is that of the pipe."""
    first = None
    while byte := os.read(reading, 1):
        if byte[0] not in (signal.SIGTERM, signal.SIGINT):
            continue
        first = first or time.monotonic()
        if time.monotonic() > first + ONE_SIGNAL:
            os._exit(128 + byte[0])
    os.close(reading)
