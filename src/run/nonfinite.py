"""Steps whose gradient is not finite are skipped: weights and optimizer stay as they were.

Gradients are synchronised before the optimizer step, so every process finds the same norm. DeepSpeed skips such steps
by itself. The schedule advances in either case. A float16 run skips steps to find its loss scale; while the scale can
still fall, these skips do not count towards `most`.
"""

import math
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from .checkpoints import describe_newest
from .signals import RunEnded

COUNTER = "SkipNonFinite"  # under which checkpoints keep the count


class SkipNonFinite(TrainerCallback):
    """Logs `skipped_steps`, the number since the run began, and ends the run after `most` in a row."""

    def __init__(self, trainer: Trainer, most: int):
        self.trainer, self.most, log = trainer, most, trainer.log
        self.skips, self.in_a_row = False, 0

        def log_count(logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                if self.in_a_row:
                    del logs["loss"]  # `Trainer` replaces one that is not finite by the average of earlier ones
                logs["skipped_steps"] = self.total
            log(logs, start_time)

        trainer.log = log_count

    @property
    def total(self) -> int:
        """Skipped steps since the run began, also before it was resumed."""
        return self.trainer.state.stateful_callbacks.get(COUNTER, {}).get("attributes", {}).get("skipped_steps", 0)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:
            gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            self.skips = not math.isfinite(torch.nn.utils.get_total_norm(gradients))
            if self.skips and self.trainer.accelerator.scaler is None:
                self.trainer.model.zero_grad()  # an optimizer ignores parameters without a gradient

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.is_deepspeed_enabled:
            skipped = self.trainer.accelerator.optimizer_step_was_skipped
            norm = self.trainer.model_wrapped.get_global_grad_norm()
            # Without check_grad_overflow in its settings, DeepSpeed takes such steps: they end the run, too.
            self.skips = skipped or (norm is not None and not math.isfinite(norm))
            if skipped and not args.fp16:
                getattr(self.trainer.lr_scheduler, "scheduler", self.trainer.lr_scheduler).step()
        self.in_a_row = self.in_a_row + 1 if self.skips and not self._scale_can_fall() else 0
        if self.skips:
            state.stateful_callbacks[COUNTER] = {"args": {}, "attributes": {"skipped_steps": self.total + 1}}
            text = f"the gradient is not finite; skipped ({self.in_a_row} in a row, {self.most} end the run)"
            self.trainer.accelerator.print(f"step {state.global_step}: {text}", flush=True)
        if self.in_a_row >= self.most:
            raise RunEnded(
                f"{self.most} steps in a row had a gradient that is not finite (--max_skipped); the weights after step "
                f"{state.global_step - self.most} are the last good ones. {describe_newest(Path(args.output_dir))}. "
                "Lower --learning_rate, or try another --seed or --bf16 false, with --force_resume true",
                everywhere=True,
            )

    def _scale_can_fall(self) -> bool:
        """Whether float16's loss scale explains the step."""
        if self.trainer.accelerator.scaler is not None:
            return self.trainer.accelerator.scaler.get_scale() > 1
        fp16 = self.trainer.is_deepspeed_enabled and self.trainer.args.fp16
        return fp16 and self.trainer.optimizer.optimizer.loss_scale > 1
