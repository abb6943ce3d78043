"""run/signals.py: a signal ends a run after its step, with a checkpoint from which the undisturbed run continues."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from run.checkpoints import find_newest
from run.signals import HANDLED, StopOnSignal
from run.startup import train
from running import run
from runs import InStep, history_of, make_run, names, same


@pytest.fixture(autouse=True)
def usual_handlers(monkeypatch):
    """This process ignores none of the signals, and has no launcher."""
    monkeypatch.delenv("RUN_RESTART", raising=False)
    before = {number: signal.signal(number, signal.default_int_handler) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED, ids=lambda number: number.name)
def test_a_signal_saves_its_step_and_the_run_resumes(small_model, questions, tmp_path, number):
    flags = dict(save_strategy="no", keep_optimizer="all")
    out, whole = tmp_path / "run", tmp_path / "whole"
    stopped = make_run("sft", small_model, questions, out, **flags)
    stopped.add_callback(InStep(2, lambda: os.kill(os.getpid(), number)))
    train(stopped, None)
    assert names(out) == ["checkpoint-2"] and find_newest(out) == (out / "checkpoint-2", [])
    assert not (out / "model.safetensors").exists(), "a stopped run has no result yet"
    assert all(signal.getsignal(handled) is signal.default_int_handler for handled in HANDLED), "handlers are restored"

    train(make_run("sft", small_model, questions, out, **flags), out / "checkpoint-2")
    train(make_run("sft", small_model, questions, whole, **flags), None)
    assert same(load_file(out / "model.safetensors"), load_file(whole / "model.safetensors"))


def test_an_ignored_hangup_stays_ignored(small_model, questions, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    trainer = make_run("sft", small_model, questions, tmp_path, save_strategy="no")
    trainer.add_callback(InStep(2, lambda: os.kill(os.getpid(), signal.SIGHUP)))
    train(trainer, None)
    assert trainer.state.global_step == 3 and not names(tmp_path)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_signal_in_the_last_step_ends_a_finished_run(small_model, questions, tmp_path):
    trainer = make_run("sft", small_model, questions, tmp_path, max_steps=1)
    trainer.add_callback(InStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train(trainer, None)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_rollout_is_used_up_before_the_run_stops(small_model, questions, tmp_path):
    flags = dict(num_iterations=2, max_steps=6, save_strategy="no")
    trainer = make_run("grpo", small_model, questions, tmp_path, **flags)
    trainer.add_callback(InStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train(trainer, None)
    assert names(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_signal(monkeypatch, launched):
    """It quits at once; under a launcher, which forwards what a cluster sends to all processes, it is the launcher that
    ends them."""
    if launched:
        monkeypatch.setenv("RUN_RESTART", "0")
    stop = StopOnSignal()
    stop.on_train_begin(None, SimpleNamespace(is_world_process_zero=False, global_step=1), None)
    os.kill(os.getpid(), signal.SIGTERM)
    assert all((signal.getsignal(number) is signal.SIG_DFL) != launched for number in HANDLED)
    if launched:
        os.kill(os.getpid(), signal.SIGTERM)
    stop.on_train_end(None, None, None)


# The best checkpoint


class ScriptedAccuracy:
    """Stands for `GreedyAccuracy`."""

    scores: list[float] = []

    def __init__(self, trainer, questions):
        self.trainer = trainer

    def __call__(self, *args, **kwargs) -> dict[str, float]:
        trainer, metrics = self.trainer, {"eval_accuracy": self.scores.pop(0)}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics


def test_best_and_newest_checkpoint_survive_a_signal_and_another_spelling(
    small_model, questions, tmp_path, monkeypatch
):
    """Kept is one checkpoint beside the best, which is that of step 1; it is the result of the whole run."""
    monkeypatch.setattr("run.accuracy.GreedyAccuracy", ScriptedAccuracy)
    monkeypatch.setattr(ScriptedAccuracy, "scores", [60.0, 10.0, 30.0, 20.0])
    monkeypatch.chdir(tmp_path)
    flags = dict(eval_file=str(questions), load_best_model_at_end=True, save_total_limit=1, max_steps=5)
    out = tmp_path / "run"
    stopped = make_run("sft", small_model, questions, out, **flags)
    stopped.add_callback(InStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train(stopped, None)
    assert names(out) == ["checkpoint-1", "checkpoint-3"] and find_newest(out) == (out / "checkpoint-3", [])
    assert ScriptedAccuracy.scores == [30.0, 20.0], "a signal leaves no time for an evaluation"

    train(make_run("sft", small_model, questions, Path("run"), **flags), Path("run/checkpoint-3"))
    assert names(out) == ["checkpoint-1", "checkpoint-5"]
    assert same(load_file(out / "model.safetensors"), load_file(out / "checkpoint-1" / "model.safetensors"))
    evaluated = [entry for entry in history_of(out / "checkpoint-5") if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluated] == [1, 2, 4, 5]
    assert find_newest(out) == (out / "checkpoint-5", []), "its trainer state was replaced after the evaluation"


# Real processes


@pytest.mark.slow
def test_life_of_a_run(small_model, questions, tmp_path):
    """Two processes, four steps: SIGTERM in step 2, --resume, SIGKILL in step 3, --resume. The result is that of an
    undisturbed run."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import os\nfrom pathlib import Path\n"
        "def mine(completions, trainer_state, **_):\n"
        "    path = Path(os.environ['SIGNALS'], f'{trainer_state.global_step + 1}')\n"
        "    if os.environ.get('RANK') == '1' and path.exists():\n"
        "        number = int(path.read_text())\n"
        "        path.unlink()\n"
        "        os.kill(os.getppid() if number == 15 else os.getpid(), number)\n"
        "    return [len(text) / 10 for text in completions]\n"
    )
    command = (
        "sh", "run_grpo.sh", "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2",
        "--max_completion_length", "4", "--save_steps", "2", "--max_steps", "4", "--report_to", "none", "--seed", "3",
        "--learning_rate", "1e-2", "--disable_tqdm", "true", "--reward_funcs", f"{reward}:mine",
    )  # fmt: skip
    signals, out, whole = tmp_path / "signals", tmp_path / "run", tmp_path / "whole"
    signals.mkdir()
    places = dict(MODEL_NP=small_model, DATA_FILE=questions, GPU_NUM=2, SIGNALS=signals)
    (signals / "2").write_text("15")
    run(*command, OUT_DIR=out, **places)
    assert names(out) == ["checkpoint-2"] and not (out / "model.safetensors").exists()
    (signals / "3").write_text("9")
    killed = run(*command, "--resume", OUT_DIR=out, check=False, **places)
    assert killed.returncode == 128 + signal.SIGKILL and names(out) == ["checkpoint-2"], killed.stdout
    run(*command, "--resume", OUT_DIR=out, **places)
    run(*command, OUT_DIR=whole, **places)
    assert history_of(out / "checkpoint-4") == history_of(whole / "checkpoint-4")
    assert same(load_file(out / "model.safetensors"), load_file(whole / "model.safetensors"))

    shutil.rmtree(whole)
    again = run(*command, "--resume", OUT_DIR=out, **places)
    assert json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4, again.stdout
    assert names(out) == ["checkpoint-2", "checkpoint-4"]
