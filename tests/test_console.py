"""trainer/console.py: a run prints lines that fit, and logs everything."""

import json
from types import SimpleNamespace

from trainer.console import StepLines

GRPO = {
    "loss": 0.01, "reward": 1.5312, "rewards/accuracy_reward/mean": 0.5312, "rewards/format_reward/mean": 1.0,
    "kl": 0.01234, "completions/mean_length": 123.4, "entropy": 0.3,
}  # fmt: skip


def log(tmp_path, capsys, logs: dict, step=120, main=True) -> str:
    lines = StepLines()
    state = SimpleNamespace(global_step=step - 20, max_steps=1000, is_world_process_zero=main)
    args = SimpleNamespace(output_dir=str(tmp_path))
    lines.on_train_begin(args, state, None)
    lines.began = lines.began[0] - 20 * 3600, lines.began[1]  # an hour a step
    state.global_step = step
    lines.on_log(args, state, None, logs)
    return capsys.readouterr().out


def test_a_step_is_one_line_that_fits(tmp_path, capsys):
    line = log(tmp_path, capsys, GRPO)
    assert line == (
        " 120/1000  reward 1.53  accuracy 0.53  format 1.00  kl 0.0123  length 123  3600.0 s/step  "
        "36 days, 16:00:00 left\n"
    )
    usual = line.replace("3600.0", "3.6").replace("36 days, 16:00:00", "1:02:03")
    assert len(usual) <= 100
    assert log(tmp_path, capsys, {"loss": 0.5, "grad_norm": 1.0}).startswith(" 120/1000  loss  0.5000  3600.0 s/step")


def test_evaluations_and_the_end_have_lines_of_their_own(tmp_path, capsys):
    line = log(tmp_path, capsys, {"eval_accuracy": 56.25, "eval_accuracy_sound": 50.0})
    assert line == " 120/1000  evaluated: accuracy 56.25  accuracy_sound 50.00\n"
    assert log(tmp_path, capsys, {"train_runtime": 3723.4, "train_loss": 1.0}) == " 120/1000  1:02:03 for 20 steps\n"


def test_everything_is_logged_by_the_first_process_alone(tmp_path, capsys):
    log(tmp_path, capsys, GRPO)
    log(tmp_path, capsys, {"eval_accuracy": 56.25}, step=200)
    assert log(tmp_path, capsys, GRPO, main=False) == ""
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert entries == [{"step": 120} | GRPO, {"step": 200, "eval_accuracy": 56.25}]


def test_what_is_not_a_number_is_null_in_the_log_and_not_on_the_line(tmp_path, capsys):
    """TRL logs None for a metric that was NaN in every pass; a skipped step has no loss."""
    line = log(tmp_path, capsys, {"reward": 1.0, "kl": None, "entropy": float("nan"), "skipped_steps": 2})
    assert line.startswith(" 120/1000  reward 1.00  skipped 2  3600.0 s/step")
    assert "skipped" not in log(tmp_path, capsys, {"reward": 1.0, "skipped_steps": 0}, step=121)
    (first, second) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=str)["entropy"] is None and "skipped_steps" in second
