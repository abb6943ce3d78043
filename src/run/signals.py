"""A signal ends a run without loss: all processes finish the step, save a checkpoint and exit.

SIGTERM (a cluster's warning), SIGINT (Ctrl-C) and SIGHUP (a closed terminal) reach processes at different moments, so
once a step they agree on whether any has received one. An inherited `nohup` is respected. A second signal quits without
saving: the launcher then kills its processes; a process without one restores the default handlers after the first.
"""

import os
import signal
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHED = "RUN_RESTART"  # set in the environment of processes that `launch.py` supervises


class RunEnded(Exception):
    """A run cannot continue for a reason that its user can change. The message says what is saved and what to do.

    Args:
        everywhere: all processes raise it at the same place.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class StopOnSignal(TrainerCallback):
    """Sets `stopped` to the signal's name when all processes have agreed to stop."""

    def __init__(self):
        self.received = 0  # by this process
        self.stopped: str | None = None
        self.usual: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.state, self.speaks = state, state.is_world_process_zero
        for number in HANDLED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.usual[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        if self.received:  # a cluster may signal the launcher and its processes
            return
        self.received = number
        if self.speaks:
            text = f"\n{signal.Signals(number).name}: finishing step {self.state.global_step + 1}, then saving; "
            os.write(2, f"{text}a second signal exits without saving\n".encode())
        if LAUNCHED not in os.environ:
            for handled in self.usual:
                signal.signal(handled, signal.SIG_DFL)

    def on_step_end(self, args, state, control, **kwargs):
        if received := max(gather_object([self.received])):
            self.stopped = signal.Signals(received).name
            # There may be seconds left: enough for the checkpoint, not for an evaluation.
            control.should_training_stop, control.should_save, control.should_evaluate = True, True, False
        return control

    def on_train_end(self, args, state, control, **kwargs):
        for number, usual in self.usual.items():
            signal.signal(number, usual)
