"""A signal in mid-run: the step is finished and saved, and the run that goes on is the one that was never stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest
from transformers import TrainerCallback

import startup
from conftest import ROOT
from running import environment
from test_resume import make_trainer
from trainer.resume import check_resumable, checkpoints_in, step_of

pytestmark = pytest.mark.usefixtures("undrawn")


class SignalInStep(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_the_step_and_the_run_goes_on(small_model, questions, tmp_path, capsys, number):
    settings = dict(save_strategy="no", keep_optimizer="all")
    stopped = make_trainer(small_model, questions, tmp_path / "run", **settings)
    stopped.add_callback(SignalInStep(number, step=2))
    startup.train(stopped, None)
    (checkpoint,) = checkpoints_in(tmp_path / "run")
    assert step_of(checkpoint) == 2
    check_resumable(checkpoint)
    assert not (tmp_path / "run" / "model.safetensors").exists(), "a run that was stopped has no result yet"
    name = signal.Signals(number).name
    assert f"{name}: stopped after step 2; {checkpoint} is saved, --resume goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    resumed = make_trainer(small_model, questions, tmp_path / "run", **settings)
    startup.train(resumed, checkpoint)
    whole = make_trainer(small_model, questions, tmp_path / "whole", **settings)
    startup.train(whole, None)
    results = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert results[0] == results[1]


def test_a_signal_in_the_last_step_ends_a_finished_run(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, max_steps=1)
    trainer.add_callback(SignalInStep(signal.SIGTERM, step=1))
    startup.train(trainer, None)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    code = (
        "import os, signal, sys\nsys.path.insert(0, 'src')\nfrom trainer.stopping import StopOnSignal\n"
        "import threading, time, torch\nStopOnSignal().on_train_begin(None, None, None)\n"
        "for number in (signal.SIGTERM, signal.SIGTERM):  # one that comes on two ways\n    os.kill(os.getpid(), number)\n"
        "time.sleep(1)\nprint('goes on', flush=True)\n"
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "torch.rand(9000, 9000) @ torch.rand(9000, 9000)  # where handlers do not run\nprint('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout == "goes on\n" and done.returncode == 128 + signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_two_processes_stop_together_by_the_launcher(preloaded, small_model, questions, tmp_path, times):
    out = tmp_path / "out"
    command = (
        "sh", "run_grpo.sh", "--use_cpu", "true", "--questions_per_step", "8", "--num_generations", "2",
        "--max_completion_length", "4", "--save_steps", "1000", "--max_steps", "1000", "--report_to", "none",
    )  # fmt: skip
    places = dict(MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=out, GPU_NUM=2, PRELOADED=preloaded)
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(**places), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        said = []
        for line in run.stdout:
            said.append(line)
            if "s/step" in line and not any("s/step" in earlier for earlier in said[:-1]):
                for _ in range(times):
                    run.send_signal(signal.SIGTERM)
                    time.sleep(1)
    output = "".join(said)
    assert "Traceback" not in output, output
    if times == 1:
        (checkpoint,) = checkpoints_in(out)
        assert run.returncode == 0 and f"SIGTERM: stopped after step {step_of(checkpoint)}" in said[-1], output
        check_resumable(checkpoint)
    else:
        assert run.returncode == 128 + signal.SIGTERM, output
