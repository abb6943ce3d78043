"""What a training run prints: a line a logged step that fits 100 columns; all figures go to `log.jsonl`.

Leaves out pictures (`curves.py`) and what --report_to sends elsewhere.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
ONLY_WITHOUT = {"loss": "reward"}  # GRPO's loss says little


class StepLines(TrainerCallback):
    """Print a line a step, and append all that was logged to `log.jsonl` in the output folder."""

    def __init__(self):
        self.began = 0.0, 0  # when this run did, and at which step: set as training begins

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero:
            return
        odd = [key for key, value in logs.items() if isinstance(value, float) and not isfinite(value)]
        line = json.dumps({"step": state.global_step} | logs | dict.fromkeys(odd))  # JSON has no NaN
        with warn_once(Path(args.output_dir) / "log.jsonl", "lines are missing"):
            append_line(Path(args.output_dir) / "log.jsonl", line)
        if "train_runtime" in logs:
            text = f"{timedelta(seconds=round(logs['train_runtime']))} for {state.global_step - self.began[1]} steps"
        elif evaluated := [f"{key.removeprefix('eval_')} {logs[key]:.2f}" for key in logs if key.startswith("eval_")]:
            text = "evaluated: " + "  ".join(evaluated)
        else:
            text = self._describe_step(logs, state)
        print_on(f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  {text}")

    def _describe_step(self, logs: dict[str, float], state) -> str:
        # TRL logs None for what was NaN in all passes.
        shown = {name: column for name, column in COLUMNS.items() if logs.get(column[0]) is not None}
        parts = [
            f"{name} {logs[key]:{form}}" for name, (key, form) in shown.items() if ONLY_WITHOUT.get(name) not in shown
        ]
        if skipped := logs.get("skipped_steps"):
            parts.append(f"skipped {skipped}")
        seconds = (time.monotonic() - self.began[0]) / max(1, state.global_step - self.began[1])
        left = timedelta(seconds=round(seconds * (state.max_steps - state.global_step)))
        return "  ".join([*parts, f"{seconds:.1f} s/step", f"{left} left"])


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, after what a full disk may have left of an earlier one."""
    with open(path, "ab+") as file:
        if path.is_file() and file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def print_on(text: str) -> None:
    """Print a line; where that cannot be (a full disk behind it, a reader that has gone), nothing more is printed, and
    the run goes on."""
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")
        with suppress(OSError):
            print(f"standard output: cannot be written ({error.strerror}); the run goes on", file=sys.stderr)


@contextmanager
def warn_once(path: Path, consequence: str) -> Iterator[None]:
    """Go on where a file cannot be written that a run can do without, and say so once."""
    try:
        yield
    except (OSError, ValueError) as error:
        if (path, str(error)) not in _unwritten:
            _unwritten.add((path, str(error)))
            with suppress(OSError):
                print(f"{path}: not written ({error}); {consequence}, the run goes on", file=sys.stderr, flush=True)


_unwritten: set[tuple[Path, str]] = set()  # and why


def print_lines(trainer: Trainer) -> None:
    """Have a trainer print lines instead of transformers' bar and dictionaries."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StepLines())
