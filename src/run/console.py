"""Print one line of at most 100 columns per logged step, and write all figures to `log.jsonl`."""

import json
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from math import isfinite
from pathlib import Path

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

# name on the line -> key in the log, format; those that were logged are shown
COLUMNS = {
    "loss": ("loss", "7.4f"),
    "reward": ("reward", "4.2f"),
    "accuracy": ("rewards/accuracy_reward/mean", "4.2f"),
    "format": ("rewards/format_reward/mean", "4.2f"),
    "kl": ("kl", "6.4f"),
    "length": ("completions/mean_length", "3.0f"),
}


class StepLines(TrainerCallback):
    """Replaces transformers' bar and dictionaries. A run continues where a line or `log.jsonl` cannot be written."""

    def __init__(self, trainer: Trainer):
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        self.began = 0.0, 0  # when this run began, and at which step
        self.unwritten: set[str] = set()  # reported once

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero:
            return
        odd = [key for key, value in logs.items() if isinstance(value, float) and not isfinite(value)]
        line = json.dumps({"step": state.global_step} | logs | dict.fromkeys(odd))  # JSON has no NaN
        try:
            with open(Path(args.output_dir, "log.jsonl"), "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            self._report_once(f"log.jsonl: not written ({error})")
        try:
            step = f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            print(f"{step}  {self._text(logs, state)}", flush=True)
        except OSError as error:  # a full disk behind it, or a reader that is gone
            sys.stdout = open(os.devnull, "w")
            self._report_once(f"standard output: not written ({error})")

    def _report_once(self, problem: str) -> None:
        if problem not in self.unwritten:
            self.unwritten.add(problem)
            with suppress(OSError):
                print(f"{problem}; the run continues", file=sys.stderr, flush=True)

    def _text(self, logs: dict[str, float], state) -> str:
        if "train_runtime" in logs:
            return f"{timedelta(seconds=round(logs['train_runtime']))} for {state.global_step - self.began[1]} steps"
        if evaluated := [f"{key.removeprefix('eval_')} {logs[key]:.2f}" for key in logs if key.startswith("eval_")]:
            return "evaluated: " + "  ".join(evaluated)
        # TRL logs None for what was NaN in all passes. GRPO's loss says little beside the reward.
        shown = {name: column for name, column in COLUMNS.items() if logs.get(column[0]) is not None}
        if "reward" in shown:
            shown.pop("loss", None)
        parts = [f"{name} {logs[key]:{form}}" for name, (key, form) in shown.items()]
        if skipped := logs.get("skipped_steps"):
            parts.append(f"skipped {skipped}")
        seconds = (time.monotonic() - self.began[0]) / max(1, state.global_step - self.began[1])
        left = timedelta(seconds=round(seconds * (state.max_steps - state.global_step)))
        return "  ".join([*parts, f"{seconds:.1f} s/step", f"{left} left"])
