"""Draw a run's curves from its newest `trainer_state.json`, and the accuracies of its evaluated checkpoints."""

import sys
from contextlib import suppress
from math import inf
from pathlib import Path
from time import monotonic

import pandas as pd
from transformers import TrainerCallback

from dataset.rows import read_json
from evaluation.collect import read_results

# title -> key in the log, its unit; the first six are the paper's
PANELS = {
    "accuracy reward": ("rewards/accuracy_reward/mean", "mean of 0 and 1"),
    "format reward": ("rewards/format_reward/mean", "mean of 0 and 1"),
    "spread of the rewards": ("group_reward_std", "standard deviation in a group"),
    "loss": ("loss", ""),
    "KL to the reference": ("kl", "nats a token"),
    "completion length": ("completions/mean_length", "tokens"),
    "entropy": ("entropy", "nats a token"),
    "groups without advantage": ("frac_reward_zero_std", "share"),
    "time": ("step_time", "s a step"),
}
ACCURACY = "accuracy on held-out questions"
# Dashes differ in greyscale; the palette of Okabe and Ito (2008) suits colour-blind readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
RECENT = 30  # s; a drawing takes 1 to 2 s, longer than a small run's save
SMOOTHED = 0.05  # share of a run's steps over which its line is averaged


class PlotCurves(TrainerCallback):
    """Draws `training.png` in the output folder at saves, at most every `RECENT` s, and at the end."""

    _drawn = -inf  # `monotonic()`, s, at the last drawing; before the first, at the start of training

    def on_train_begin(self, args, state, control, **kwargs):
        self._drawn = monotonic()

    def on_save(self, args, state, control, **kwargs):
        if monotonic() > self._drawn + RECENT:
            self.on_train_end(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            try:
                plot_curves({folder.name: (folder, state.log_history)}, folder / "training.png")
            except (ValueError, OSError) as error:
                print(f"training.png: not written ({error}); the run continues", file=sys.stderr, flush=True)
            self._drawn = monotonic()


def read_history(run: Path) -> list[dict]:
    """The log of a run, an entry per logged step, from its newest complete state. Raises a `FileNotFoundError`."""
    found: dict[int, list[dict]] = {}
    for path in (*run.glob("checkpoint-*/trainer_state.json"), run / "trainer_state.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # cut off; an older one is complete
            state = read_json(path, "an older one is read")
            found.setdefault(state["global_step"], state["log_history"])
    if not found:
        raise FileNotFoundError(f"{run}: holds no trainer_state.json of a run that has saved")
    return found[max(found)]


def plot_curves(runs: dict[str, tuple[Path, list[dict]]], path: Path) -> None:
    """Draw runs over one another: {name: (folder, log)}; `path`'s suffix is the format. Raises a `ValueError` if there
    is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a folder's name may hold `$`
    from matplotlib import pyplot

    logs = {name: pd.DataFrame(history).groupby("step").first() for name, (_, history) in runs.items() if history}
    panels = {title: panel for title, panel in PANELS.items() if any(panel[0] in log for log in logs.values())}
    accuracies = {name: _accuracies(folder, logs.get(name)) for name, (folder, _) in runs.items()}
    if any(accuracies.values()):
        panels[ACCURACY] = ("", "%, with its 95% interval")
    if not panels:
        raise ValueError("nothing was logged yet")
    rows = -(-len(panels) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(13, 3.2 * rows), squeeze=False, layout="constrained")
    for axis, (title, (key, unit)) in zip(axes.flat, panels.items(), strict=False):
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        for index, name in enumerate(runs):
            look = {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}
            if title == ACCURACY and accuracies[name]:
                steps, values, low, high = zip(*accuracies[name], strict=True)
                axis.errorbar(steps, values, yerr=[low, high], marker="o", capsize=3, label=name, **look)
            elif name in logs and key in logs[name]:
                values = logs[name][key].dropna()
                axis.plot(values.index, values, ".", color=look["color"], alpha=0.25, markersize=4)
                smoothed = values.rolling(max(1, round(SMOOTHED * len(values))), min_periods=1, center=True).mean()
                axis.plot(values.index, smoothed, label=name, **look)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    if len(runs) > 1:
        axes[0, 0].legend(fontsize="small")
    figure.suptitle(", ".join(runs))
    path = path if path.suffix else path.with_suffix(".png")  # as matplotlib does
    partial = path.with_stem(f".{path.stem}.partial")
    try:
        figure.savefig(partial, dpi=110)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        pyplot.close(figure)


def _accuracies(folder: Path, log: pd.DataFrame | None) -> list[tuple[int, float, float, float]]:
    """(step, accuracy in %, distances to the lower and upper end of its interval) of evaluated checkpoints, else of the
    accuracies measured in training, which have no interval."""
    found = [(step, result) for result in read_results(folder)[0] if (step := result.step) is not None]
    if points := {step: result for step, result in found if result.asked == found[0][1].asked}:
        bounds = ((step, result.accuracy, *result.interval) for step, result in sorted(points.items()))
        return [(step, value, value - low, high - value) for step, value, low, high in bounds]
    values = log["eval_accuracy"].dropna() if log is not None and "eval_accuracy" in log else {}
    return [(step, value, 0.0, 0.0) for step, value in values.items()]
