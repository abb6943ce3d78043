"""run/console.py: a line a logged step, everything in log.jsonl, and a run that continues without either."""

import os
import sys
from types import SimpleNamespace

import pytest

from run.console import StepLines
from run.startup import train
from runs import InStep, log_of, make_run

GRPO = {
    "loss": 0.01, "reward": 1.5312, "rewards/accuracy_reward/mean": 0.5312, "rewards/format_reward/mean": 1.0,
    "kl": 0.01234, "completions/mean_length": 123.4, "entropy": 0.3,
}  # fmt: skip


@pytest.fixture
def log(tmp_path, capsys):
    """Logs one entry, and returns the line that is printed."""
    lines = StepLines(SimpleNamespace(remove_callback=lambda _: None))
    args = SimpleNamespace(output_dir=str(tmp_path))

    def log(logs: dict, step: int = 120, main: bool = True) -> str:
        state = SimpleNamespace(global_step=step - 20, max_steps=1000, is_world_process_zero=main)
        lines.on_train_begin(args, state, None)
        state.global_step = step
        lines.on_log(args, state, None, logs)
        return capsys.readouterr().out

    return log


def test_a_step_is_one_short_line(log):
    line = log(GRPO)
    assert line.split()[:13:2] == ["120/1000", "1.53", "0.53", "1.00", "0.0123", "123", "s/step"]
    assert line.split()[1:11:2] == ["reward", "accuracy", "format", "kl", "length"] and line.count("\n") == 1
    assert len(line) <= 101 and "0.01 " not in line, "beside a reward, GRPO's loss says little"
    assert log({"loss": 0.5, "grad_norm": 1.0}).split()[:3] == ["120/1000", "loss", "0.5000"]


def test_evaluations_and_the_end_have_their_own_lines(log):
    line = log({"eval_accuracy": 56.25, "eval_accuracy_sound": 50.0})
    assert line.split() == ["120/1000", "evaluated:", "accuracy", "56.25", "accuracy_sound", "50.00"]
    assert "1:02:03" in log({"train_runtime": 3723.4, "train_loss": 1.0})


def test_everything_is_logged_by_the_first_process(log, tmp_path):
    log(GRPO)
    log({"eval_accuracy": 56.25}, step=200)
    assert log(GRPO, main=False) == ""
    assert log_of(tmp_path) == [{"step": 120} | GRPO, {"step": 200, "eval_accuracy": 56.25}]


def test_nan_is_null_in_the_log_and_absent_from_the_line(log, tmp_path):
    line = log({"reward": 1.0, "kl": None, "entropy": float("nan"), "grad_norm": float("inf"), "skipped_steps": 2})
    assert line.split()[1:5] == ["reward", "1.00", "skipped", "2"] and "kl" not in line
    assert "skipped" not in log({"reward": 1.0, "skipped_steps": 0}, step=121)
    (entry, _) = log_of(tmp_path)
    assert entry["entropy"] is None and entry["grad_norm"] is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_run_continues_without_standard_output_and_log(small_model, questions, tmp_path, capsys, monkeypatch):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    trainer = make_run("sft", small_model, questions, tmp_path)
    with open("/dev/full", "w") as full:
        trainer.add_callback(InStep(2, lambda: monkeypatch.setattr(sys, "stdout", full)))
        train(trainer, None)
        sys.stdout.close()
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.close()
    assert (tmp_path / "checkpoint-3").is_dir() and (tmp_path / "model.safetensors").is_file()
    said = capsys.readouterr().err
    assert said.count("log.jsonl") == 1 and said.count("standard output") == 1


def test_a_run_continues_after_its_reader_is_gone(small_model, questions, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    trainer = make_run("sft", small_model, questions, tmp_path)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        os.close(reading)  # as `| head` does
        train(trainer, None)
        sys.stdout.close()
        monkeypatch.undo()
        with pytest.raises(OSError):
            pipe.close()
    assert len(log_of(tmp_path)) == 4 and (tmp_path / "model.safetensors").is_file()
