"""Memory that is tried out before the first step, and what is said where it is not enough.

What would fail at step 105, at the longest prompt with completions of the full length, fails in the first minute: the
probe runs all passes of the largest micro-batch that the data can give, and throws everything away. The run is then the
one that it would have been, bit for bit. Leaves out the optimizer's step, and calculating (`memory.py`).
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count

from .fitting import advise, device_of, size
from .memory import Settings, estimate


class MemoryProbe:
    """Mixin, to stand before the trainer class, which adds `_largest_batch`."""

    memory_settings: Settings | None = None  # of the run; its longest prompt, clip and completion are the data's
    probing = False
    describe_batch: Callable[[], str] = staticmethod(lambda: "no pass had begun")  # what is being computed

    def _largest_batch(self) -> dict[str, Any]:
        """A micro-batch of the longest prompts, clips and completions, by the passes that precede the policy's."""
        raise NotImplementedError

    def probe_memory(self) -> None:
        """Run the largest micro-batch; to be called in all processes, with the model in its engine, before a step."""
        args, gradients = self.args, self.accelerator.gradient_state
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        self.model_wrapped.train()
        self.probing = True
        with unchanged_random_state(args.device):
            batch, held = self._largest_batch(), self._imitate_optimizer()
            gradients._set_sync_gradients(False)  # so that an engine takes no step
            for _ in range(min(2, args.gradient_accumulation_steps)):  # the second pass has the gradients of the first
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model_wrapped, batch)
                # Engines keep gradients where no `zero_grad` reaches: these are zero.
                kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                self.accelerator.backward(0 * loss, **kwargs)
                del loss
            gradients._set_sync_gradients(True)
            self.model_wrapped.zero_grad()
        del batch, held
        clear_device_cache()
        self.probing = False

    def _imitate_optimizer(self) -> torch.Tensor | None:
        """As much memory as the optimizer's state will take from its first step on; engines have theirs already."""
        if self.is_deepspeed_enabled or self.optimizer.state or self.memory_settings is None:
            return None
        floats = self.memory_settings.moments * get_model_param_count(self.model, trainable_only=True)
        return torch.empty(int(floats), device=self.args.device)


class ProbeFirst(TrainerCallback):
    """Probes when training begins: the model is in its engine, a checkpoint's optimizer loaded."""

    def __init__(self, trainer: MemoryProbe):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.probe_memory()
        largest = self.trainer.describe_batch()
        used = f": {size(torch.cuda.max_memory_allocated(args.device))} at most" if args.device.type == "cuda" else ""
        self.trainer.accelerator.print(f"memory probed with {largest}{used}", flush=True)


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Within this context, random numbers are drawn that nobody else misses."""
    states = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def explain_out_of_memory(trainer: Trainer) -> Iterator[None]:
    """End the run with a message where its device's memory is not enough: in which step, over what, what to lower."""
    try:
        yield
    except RuntimeError as error:  # of a CPU there is no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(describe_failure(trainer, error))


def describe_failure(trainer: Trainer, error: RuntimeError) -> str:
    """What a run says that is out of memory: when, over what, and which settings take less."""
    when = f"in step {trainer.state.global_step + 1}"
    if trainer.probing:
        when = "before step 1, in the largest micro-batch that the data can give (--probe_memory false skips it)"
    what = str(error).strip().partition("\n")[0]
    message = f"out of memory {when}: {trainer.describe_batch()}\n{what}"
    if (settings := trainer.memory_settings) is None:
        return message
    config = trainer.accelerator.unwrap_model(trainer.model).config
    found = estimate(config, settings)
    return f"{message}\n{advise(config, found, device_of(trainer.args)[1], than=0.9)}"
