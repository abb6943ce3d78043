"""Steps whose loss or gradient is not finite are skipped: weights and optimizer stay as they were, on all processes.

What decides is the norm of the whole gradient, which is the same on every process under every engine, and which is
computed anyway: agreeing takes no collective of its own. A loss that is not finite makes its gradient so. Without an
engine the gradients are dropped, and an optimizer leaves parameters without one alone; zeros would not do, since Adam
moves by its momentum, too. DeepSpeed skips by itself and says so. The schedule goes on: a step's learning rate follows
from its number, whatever was skipped before, and the last one's is what the schedule ends with.

Leaves out float16, whose loss scale is found by skipping: those steps are counted, but end no run while the scale can
fall. Whether the schedule waits for them is left to DeepSpeed, which has it wait, and to accelerate, which does not see
what a fused optimizer skips.
"""

import math
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

from .resume import describe_newest
from .stopping import RunEnded

MAX_SKIPPED = 5  # in a row


class FiniteSteps:
    """Mixin, to stand before the trainer class. Logs `skipped_steps`, the number since the run began."""

    _finite_loss: torch.Tensor | bool = True  # of all passes since the last step, on this process
    _in_a_row = 0  # skipped steps
    _taken = False  # a step since the last log
    _held = False  # DeepSpeed has skipped a step, so that `Trainer` holds the schedule back

    @property
    def skipped_steps(self) -> int:
        """Since the run began, also before it was resumed: kept where checkpoints keep the state of callbacks."""
        return self.state.stateful_callbacks.get("FiniteSteps", {}).get("attributes", {}).get("skipped_steps", 0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if return_outputs or not self.model.training:
            return loss
        finite = loss.detach().isfinite()
        self._finite_loss = finite & self._finite_loss
        return loss * torch.where(finite, 1.0, torch.nan).to(loss.dtype)

    def _get_grad_norm(self, model, grad_norm=None) -> float | torch.Tensor | None:
        """The gradient's norm; None if it is not finite, after which the step that follows does nothing.

        Raises:
            RunEnded: DeepSpeed has taken a step along such a gradient.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        by_engine = self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped
        finite_loss, self._finite_loss = self._finite_loss, True
        if not by_engine and (norm is None or 0 <= float(norm) < math.inf):
            self._in_a_row, self._taken = 0, True
            return norm
        scale = self._loss_scale()
        if self.is_deepspeed_enabled:
            if not by_engine:
                raise RunEnded(
                    f"step {self.state.global_step + 1}: the gradient was not finite, and DeepSpeed took the step all "
                    f"the same, which has ruined the weights. {describe_newest(Path(self.args.output_dir))}. Take "
                    "check_grad_overflow and compute_grad_norm out of its settings (CONFIG)"
                )
            self._held = scale is None
        elif scale is None:
            model.zero_grad()
        self._count(bool(finite_loss), scale)
        return None

    def _loss_scale(self) -> float | None:
        """By which float16's losses are multiplied now; None in other precisions."""
        if self.accelerator.scaler is not None:
            return self.accelerator.scaler.get_scale()
        return self.optimizer.optimizer.loss_scale if self.is_deepspeed_enabled and self.args.fp16 else None

    def _count(self, finite_loss: bool, scale: float | None) -> None:
        total = self.skipped_steps + 1
        self.state.stateful_callbacks["FiniteSteps"] = {"args": {}, "attributes": {"skipped_steps": total}}
        failed = [str(process) for process, finite in enumerate(gather_object([finite_loss])) if not finite]
        if scale is not None and scale > 1:
            return
        self._in_a_row += 1
        what = f"the loss of process {', '.join(failed)}" if failed else "the gradient"
        if self.accelerator.is_main_process:
            print(
                f"step {self.state.global_step + 1}: {what} is not finite; skipped, weights and optimizer are as they "
                f"were ({self._in_a_row} in a row, {self._most_in_a_row} end the run)",
                file=sys.stderr,
                flush=True,
            )

    @property
    def _most_in_a_row(self) -> int:
        return getattr(self.args, "max_skipped", MAX_SKIPPED)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """What `Trainer` does after a step; then the run ends if that was one too many.

        Raises:
            RunEnded: `max_skipped` steps in a row were skipped.
        """
        if self._held:
            scheduler = self.lr_scheduler
            getattr(scheduler, "scheduler", scheduler).step()
            self._held = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._in_a_row >= self._most_in_a_row:
            skipped, self._in_a_row = self._in_a_row, 0
            last = self.state.global_step - skipped
            raise RunEnded(
                f"{skipped} steps in a row had a loss or gradient that is not finite (--max_skipped); what step {last} "
                f"learned is the last that is good. {describe_newest(Path(self.args.output_dir))}. If it comes to this "
                "again, lower --learning_rate, or take another --seed or --bf16 false, with --force_resume true",
                everywhere=True,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the count with every step's figures; of steps that were skipped, `Trainer` would invent a loss."""
        if "loss" in logs:
            if not self._taken:
                del logs["loss"]
            logs["skipped_steps"], self._taken = self.skipped_steps, False
        super().log(logs, start_time)
