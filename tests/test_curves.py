"""run/curves.py and plot_training.py: a run's curves, from what is on the disk."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import plot_training
from run.curves import PlotCurves, plot_curves, read_history
from test_show_acc import write_result


def write_state(folder: Path, step: int, **logged) -> Path:
    """A checkpoint's state after `step` steps, each with one logged figure or more."""
    path = folder / f"checkpoint-{step}" / "trainer_state.json"
    path.parent.mkdir(parents=True)
    history = [{"step": at, "loss": 1 / at, "group_reward_std": 0.5} for at in range(1, step + 1)]
    path.write_text(json.dumps({"global_step": step, "log_history": [*history, {"step": step} | logged]}))
    return path


def test_the_newest_whole_state_counts(tmp_path):
    for step in (2, 10):
        write_state(tmp_path, step)
    assert len(read_history(tmp_path)) == 11
    newest = write_state(tmp_path, 20)
    newest.write_text(newest.read_text()[:-30])  # the run was killed while it wrote
    assert len(read_history(tmp_path)) == 11
    assert read_history(tmp_path / "gone") == []


def test_runs_are_drawn_over_one_another(tmp_path, monkeypatch, capsys):
    write_state(tmp_path / "a", 3)
    write_state(tmp_path / "b", 5, eval_accuracy=60.0)
    plot_curves({"$a_b^{c$": (tmp_path / "a", read_history(tmp_path / "a"))}, tmp_path / "no formula.png")
    command = ["plot_training.py", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "x.svg")]
    monkeypatch.setattr("sys.argv", command)
    plot_training.main()
    assert str(tmp_path / "x.svg") in capsys.readouterr().out and "<svg" in (tmp_path / "x.svg").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "training.png").write_text("of the run")
    monkeypatch.setattr("sys.argv", ["plot_training.py", "a", "b"])
    plot_training.main()
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "a" / "training.png").read_text() == "of the run"
    monkeypatch.setattr("sys.argv", ["plot_training.py", str(tmp_path / "gone")])
    with pytest.raises(SystemExit, match="plot_training.py: .*gone"):
        plot_training.main()


def test_accuracies_are_those_of_evaluated_checkpoints_else_of_the_log(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.errorbar",
        lambda self, steps, values, yerr, **_: drawn.append((list(steps), list(values), [list(ends) for ends in yerr])),
    )
    write_state(tmp_path, 3, eval_accuracy=60.0)
    runs = {"run": (tmp_path, read_history(tmp_path))}
    plot_curves(runs, tmp_path / "log.svg")
    for step, right in ((1, 150), (3, 210)):
        write_result(tmp_path, str(step), right)
    write_result(tmp_path, "3", 30, audio="_silent")  # the real one counts
    plot_curves(runs, tmp_path / "evaluated.svg")
    (logged, (steps, values, ends)) = drawn
    assert logged == ([3], [60.0], [[0.0], [0.0]])
    assert (steps, values) == ([1, 3], [50.0, 70.0]) and all(0 < bound < 10 for side in ends for bound in side)


def test_the_picture_is_written_at_the_end_and_a_run_ends_well_without_it(tmp_path, capsys):
    state = SimpleNamespace(is_world_process_zero=True, log_history=[{"step": 1, "loss": 1.0}])
    PlotCurves().on_train_end(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    state.log_history.clear()
    PlotCurves().on_train_end(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert "training.png" in capsys.readouterr().err
    shutil.rmtree(tmp_path)
    state.log_history.append({"step": 1, "loss": 1.0})
    PlotCurves().on_train_end(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert "training.png" in capsys.readouterr().err


def test_a_run_of_one_step_or_none(tmp_path):
    plot_curves({"a": (tmp_path, [{"step": 1, "kl": 0.0}])}, tmp_path / "a.png")
    with pytest.raises(ValueError):
        plot_curves({"a": (tmp_path, [])}, tmp_path / "b.png")
