"""Draw a run's curves from its newest `trainer_state.json`, and the accuracies of its evaluated checkpoints."""

import sys
from contextlib import suppress
from pathlib import Path

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
SMOOTHED = 0.05  # share of a run's steps over which its line is averaged


class PlotCurves(TrainerCallback):
    """Draws `training.png` in the output folder at the end. `plot_training.py` draws a run that is not finished."""

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            try:
                plot_curves({folder.name: (folder, state.log_history)}, folder / "training.png")
            except (ValueError, OSError) as error:
                print(f"training.png: not written ({error})", file=sys.stderr, flush=True)


def read_history(run: Path) -> list[dict]:
    """The log of a run, an entry per logged step, from its newest complete state; empty if there is none."""
    found: dict[int, list[dict]] = {}
    for path in (*run.glob("checkpoint-*/trainer_state.json"), run / "trainer_state.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # cut off; an older one is complete
            state = read_json(path, "an older one is read")
            found.setdefault(state["global_step"], state["log_history"])
    return found[max(found)] if found else []


def plot_curves(runs: dict[str, tuple[Path, list[dict]]], path: Path) -> None:
    """Draw runs over one another: {name: (folder, log)}; `path`'s suffix is the format. Raises a `ValueError` if there
    is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a folder's name may hold `$`
    from matplotlib import pyplot

    pyplot.style.use("tableau-colorblind10")
    logs = {name: pd.DataFrame(history).groupby("step").first() for name, (_, history) in runs.items() if history}
    panels = {title: panel for title, panel in PANELS.items() if any(panel[0] in log for log in logs.values())}
    accuracies = {name: _accuracies(folder, logs.get(name)) for name, (folder, _) in runs.items()}
    if any(accuracies.values()):
        panels[ACCURACY] = ("", "%, with its 95% interval")
    if not panels:
        raise ValueError(f"{', '.join(runs)}: nothing was logged or evaluated yet")
    rows = -(-len(panels) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(13, 3.2 * rows), squeeze=False, layout="constrained")
    for axis, (title, (key, unit)) in zip(axes.flat, panels.items(), strict=False):
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        for index, name in enumerate(runs):
            color = f"C{index % 10}"
            if title == ACCURACY and accuracies[name]:
                steps, values, low, high = zip(*accuracies[name], strict=True)
                axis.errorbar(steps, values, yerr=[low, high], marker="o", capsize=3, label=name, color=color)
            elif name in logs and key in logs[name]:
                values = logs[name][key].dropna()
                axis.plot(values.index, values, ".", color=color, alpha=0.25, markersize=4)
                smoothed = values.rolling(max(1, round(SMOOTHED * len(values))), min_periods=1, center=True).mean()
                axis.plot(values.index, smoothed, label=name, color=color)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    if len(runs) > 1:
        axes[0, 0].legend(fontsize="small")
    figure.suptitle(", ".join(runs))
    try:
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def _accuracies(folder: Path, log: pd.DataFrame | None) -> list[tuple[int, float, float, float]]:
    """(step, accuracy in %, distances to the lower and upper end of its interval) of evaluated checkpoints, else of the
    accuracies measured in training, which have no interval."""
    found = [(result.step, result) for result in read_results(folder)[0] if result.step is not None and result.is_real]
    if points := {step: result for step, result in found if result.asked == found[0][1].asked}:
        bounds = ((step, result.accuracy, *result.interval) for step, result in sorted(points.items()))
        return [(step, value, value - low, high - value) for step, value, low, high in bounds]
    values = log["eval_accuracy"].dropna() if log is not None and "eval_accuracy" in log else {}
    return [(step, value, 0.0, 0.0) for step, value in values.items()]
