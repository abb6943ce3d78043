"""A step whose loss or gradient is not finite: nothing moves, the run goes on, and too many in a row end it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

import startup
from running import run, skip_without_compiler
from test_resume import make_trainer as make_grpo_trainer
from test_sft import make_trainer as make_sft_trainer
from trainer.console import print_lines
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.resume import checkpoints_in
from trainer.stopping import RunEnded

pytestmark = pytest.mark.usefixtures("undrawn")


def make_trainer(kind: str, model, data, out, **settings):
    """A run of four steps that saves after each."""
    if kind == "grpo":
        return make_grpo_trainer(model, data, out, **dict(max_steps=4, keep_optimizer="all") | settings)
    fixed = dict(max_steps=4, save_strategy="steps", save_steps=1, questions_per_step=2, lr_scheduler_type="linear")
    return make_sft_trainer(model, data, out, **fixed | dict(keep_optimizer="all", disable_tqdm=True) | settings)


@pytest.fixture
def spoil(monkeypatch):
    """Has a damage of DAMAGES change the loss of the first pass of some steps."""

    def spoil(trainer, steps, damage: str) -> None:
        owner, name = (
            (AudioGRPOTrainer, "_compute_loss") if hasattr(trainer, "num_generations") else (Trainer, "compute_loss")
        )
        compute_loss, spoiled = getattr(owner, name), set()

        def compute(self, *args, **kwargs):
            loss, step = compute_loss(self, *args, **kwargs), self.state.global_step + 1
            if step not in steps or step in spoiled:
                return loss
            spoiled.add(step)
            return DAMAGES[damage](loss)

        monkeypatch.setattr(owner, name, compute)

    return spoil


DAMAGES = {
    "nan": lambda loss: loss * torch.nan,
    "inf": lambda loss: loss + torch.inf,  # whose gradient is finite
    "gradient": lambda loss: loss + (loss - loss.detach()).abs().sqrt(),  # finite, with an infinite gradient
}


def state_of(checkpoint) -> dict:
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = {f"{i} {key}": value for i, moment in optimizer["state"].items() for key, value in moment.items()}
    return load_file(checkpoint / "model.safetensors") | moments


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("kind", "damage"), [("grpo", "nan"), ("grpo", "gradient"), ("sft", "nan"), ("sft", "inf")])
def test_a_step_that_is_not_finite_moves_nothing_and_the_run_goes_on(
    small_model, questions, tmp_path, capsys, spoil, kind, damage
):
    trainer = make_trainer(kind, small_model, questions, tmp_path)
    print_lines(trainer)
    spoil(trainer, {2}, damage)
    trainer.train()
    states = [state_of(path) for path in checkpoints_in(tmp_path)]
    assert same(states[0], states[1]) and not same(states[1], states[2]) and not same(states[2], states[3])
    assert all(value.isfinite().all() for state in states for value in state.values())

    said = capsys.readouterr()
    what = "the gradient" if damage == "gradient" else "the loss of process 0"
    assert f"step 2: {what} is not finite; skipped" in said.err and said.err.count("not finite") == 1
    assert [line for line in said.out.splitlines() if "skipped 1" in line and "2/4" in line], said.out
    logged = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    steps = [entry for entry in logged if "skipped_steps" in entry]
    assert [entry["skipped_steps"] for entry in steps] == [0, 1, 1, 1]
    assert [key in entry for entry in steps for key in ("loss", "grad_norm")] == [True, True, False, False, *[True] * 4]
    rates = [entry["learning_rate"] for entry in steps]
    assert rates == pytest.approx([rates[0] * left / 4 for left in (4, 3, 2, 1)]), "the schedule goes on"


@pytest.mark.parametrize("kind", ["grpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_too_many_in_a_row_end_the_run_with_its_last_good_checkpoint(small_model, questions, tmp_path, spoil, kind):
    trainer = make_trainer(kind, small_model, questions, tmp_path, max_steps=8, max_skipped=2, save_steps=3)
    spoil(trainer, {2, 4, 5, 7}, "nan")
    with pytest.raises(SystemExit) as ended:
        startup.train(trainer, None)
    assert trainer.state.global_step == 5
    message = str(ended.value.code)
    assert "2 steps in a row" in message and "what step 3 learned is the last that is good" in message
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-3'}: --resume goes on from it" in message
    logged = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(logged[-1])["skipped_steps"] == 3, "the last step is logged before the run ends"
    assert not (tmp_path / "model.safetensors").exists()


def test_a_resumed_run_counts_on_and_its_row_begins_anew(small_model, questions, tmp_path, spoil):
    settings = dict(max_steps=6, max_skipped=2)
    stopped = make_trainer("grpo", small_model, questions, tmp_path, **settings)
    spoil(stopped, {1, 2, 3}, "nan")
    with pytest.raises(RunEnded, match="what step 0 learned"):
        stopped.train()
    resumed = make_trainer("grpo", small_model, questions, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    counts = [entry["skipped_steps"] for entry in resumed.state.log_history if "skipped_steps" in entry]
    assert counts == [1, 2, 3, 3, 3, 3]


def test_before_the_first_checkpoint_there_is_none_to_name(small_model, questions, tmp_path, spoil):
    trainer = make_trainer("sft", small_model, questions, tmp_path, max_skipped=1, save_steps=100)
    spoil(trainer, {1}, "nan")
    with pytest.raises(RunEnded, match="No checkpoint was saved yet"):
        trainer.train()
    with pytest.raises(ValueError, match="--max_skipped 0: expected 1 or more"):
        make_trainer("sft", small_model, questions, tmp_path, max_skipped=0)


@pytest.mark.parametrize(("scale", "counted"), [(8.0, []), (2.0, [3, 4])])
def test_skipping_finds_float16s_loss_scale_and_ends_no_run_before(
    small_model, questions, tmp_path, capsys, spoil, scale, counted
):
    trainer = make_trainer("sft", small_model, questions, tmp_path, max_steps=5, max_skipped=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)  # which halves it after such a step
    spoil(trainer, {2, 3, 4}, "inf")
    if counted:
        with pytest.raises(RunEnded, match="2 steps in a row"):
            trainer.train()
    else:
        trainer.train()
    assert trainer.skipped_steps == 3 and all(weight.isfinite().all() for weight in trainer.model.parameters())
    said = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert said == [f"step {step}" for step in counted]


SPOILED = """
import os, sys
sys.path.insert(0, "src")
import startup, train
from trainer.grpo_trainer import AudioGRPOTrainer
compute_loss = AudioGRPOTrainer._compute_loss
def spoiled(self, *args):
    bad = self.state.global_step + 1 in (2, 4, 5) and self._step % 2 == 0 and os.environ["RANK"] == "1"
    return compute_loss(self, *args) * (float("nan") if bad else 1.0)
AudioGRPOTrainer._compute_loss = spoiled
train.REWARD_FUNCS["accuracy"] = lambda completions, **_: [float(i + len(text)) for i, text in enumerate(completions)]
startup.run_training(train.make_parser(), train.build_trainer)
"""


def moments_of(checkpoint: Path) -> dict:
    """What the optimizer holds, of all processes."""
    found = {}
    for path in sorted(checkpoint.rglob("*optim*.pt")):
        entries = [torch.load(path, weights_only=False)]  # this test's own
        while entries:
            value = entries.pop()
            if torch.is_tensor(value):
                found[f"{path.name} {len(found)}"] = value
            elif isinstance(value, dict | list):
                entries += value.values() if isinstance(value, dict) else value
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["", "ds_zero2", "ds_zero3"])
def test_one_processs_loss_stops_all_from_stepping(preloaded, small_model, questions, tmp_path, engine):
    skip_without_compiler(engine)
    (tmp_path / "spoiled.py").write_text(SPOILED)
    out = tmp_path / "out"
    flags = (
        "--use_cpu", "true", "--questions_per_step", "4", "--num_generations", "2", "--max_completion_length", "4",
        "--learning_rate", "1e-2", "--save_steps", "1", "--max_steps", "8", "--max_skipped", "2", "--report_to", "none",
        "--keep_optimizer", "all", "--disable_tqdm", "true", "--model_name_or_path", small_model, "--output_dir", out,
        "--data_file", questions, *(["--deepspeed", f"conf/{engine}.json"] if engine else []),
    )  # fmt: skip
    start = ("python", "src/launch/start.py", "--standalone", "--nproc_per_node", "2")
    done = run(*start, tmp_path / "spoiled.py", *flags, check=False, PRELOADED=preloaded)
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    assert "step 2: the loss of process 1 is not finite; skipped" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "2 steps in a row" in last and f"The last good checkpoint is {out / 'checkpoint-5'}" in last, done.stdout
    assert done.stdout.count("2 steps in a row") == 1

    weights = [load_file(path / "model.safetensors") for path in checkpoints_in(out)]
    moments = [moments_of(path) for path in checkpoints_in(out)]
    assert len(weights) == 5 and all(moments)
    for before, skipped in ((0, True), (1, False), (2, True), (3, True)):
        assert same(weights[before], weights[before + 1]) == skipped
        assert same(moments[before], moments[before + 1]) == skipped
    assert all(value.isfinite().all() for found in weights + moments for value in found.values())
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["skipped_steps"] for entry in steps] == [0, 1, 1, 2, 3]
    rates = [entry["learning_rate"] for entry in steps]
    assert rates == pytest.approx([1e-2 * left / 8 for left in (8, 7, 6, 5, 4)]), "the schedule goes on"
