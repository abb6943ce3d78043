"""run/nonfinite.py: a gradient that is not finite changes nothing, and too many in a row end the run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from run.checkpoints import checkpoints_in, find_newest
from run.startup import train
from running import run, skip_without_compiler
from runs import log_of, make_run, same

DAMAGES = {
    "nan": lambda loss: loss * torch.nan,
    "gradient": lambda loss: loss + (loss - loss.detach()).abs().sqrt(),  # finite, with an infinite gradient
}


def make_spoiled(kind: str, *places, steps: set[int], damage: str = "nan", **flags):
    """A run of four steps, in some of which the first pass's loss is spoiled; that of GRPO has two passes a step."""
    trainer = make_run(kind, *places, **dict(max_steps=4, keep_optimizer="all") | flags)
    compute_loss, spoiled = trainer.compute_loss, set()

    def compute(*args, **kwargs):
        loss, step = compute_loss(*args, **kwargs), trainer.state.global_step + 1
        if step not in steps or step in spoiled:
            return loss
        spoiled.add(step)
        return DAMAGES[damage](loss)

    trainer.compute_loss = compute
    return trainer


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's moments."""
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    moments = {f"{i} {key}": value for i, moment in optimizer["state"].items() for key, value in moment.items()}
    return load_file(checkpoint / "model.safetensors") | moments


@pytest.mark.parametrize(("kind", "damage"), [("grpo", "nan"), ("grpo", "gradient"), ("sft", "nan")])
def test_a_step_is_skipped_and_the_run_continues(small_model, questions, tmp_path, kind, damage):
    trainer = make_spoiled(kind, small_model, questions, tmp_path, steps={2}, damage=damage)
    assert trainer.args.gradient_accumulation_steps == 2, "the second pass's gradient is finite"
    train(trainer, None)
    states = [state_of(path) for path in checkpoints_in(tmp_path)]
    assert same(states[0], states[1]) and not same(states[1], states[2]) and not same(states[2], states[3])
    assert all(value.isfinite().all() for state in states for value in state.values())
    steps = [entry for entry in log_of(tmp_path) if "skipped_steps" in entry]
    assert [entry["skipped_steps"] for entry in steps] == [0, 1, 1, 1]
    assert ["loss" in entry for entry in steps] == [True, False, True, True]
    rates = [entry["learning_rate"] for entry in steps]
    assert rates == pytest.approx([rates[0] * left / 4 for left in (4, 3, 2, 1)]), "the schedule advances"


def test_too_many_in_a_row_end_the_run(small_model, questions, tmp_path):
    flags = dict(steps={2, 4, 5, 7}, max_steps=8, max_skipped=2, save_steps=3)
    trainer = make_spoiled("sft", small_model, questions, tmp_path, **flags)
    with pytest.raises(SystemExit) as ended:
        train(trainer, None)
    assert trainer.state.global_step == 5
    assert "--max_skipped" in str(ended.value.code) and "checkpoint-3" in str(ended.value.code)
    assert find_newest(tmp_path)[0] == tmp_path / "checkpoint-3" and not (tmp_path / "model.safetensors").exists()


def test_a_resumed_run_continues_the_count(small_model, questions, tmp_path):
    flags = dict(max_steps=6, max_skipped=2)
    with pytest.raises(SystemExit):
        train(make_spoiled("sft", small_model, questions, tmp_path, steps={2, 4, 5}, **flags), None)
    train(make_spoiled("sft", small_model, questions, tmp_path, steps={6}, **flags), tmp_path / "checkpoint-4")
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry["skipped_steps"] for entry in history if "skipped_steps" in entry] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(("scale", "ends"), [(16.0, False), (2.0, True)])
def test_steps_that_find_the_loss_scale_of_float16_do_not_end_the_run(small_model, questions, tmp_path, scale, ends):
    trainer = make_spoiled("sft", small_model, questions, tmp_path, steps={2, 3, 4}, max_steps=5, max_skipped=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)  # halves it after such a step
    if ends:
        with pytest.raises(SystemExit):
            train(trainer, None)
    else:
        train(trainer, None)
    assert trainer.state.global_step == (3 if ends else 5), "at a scale of 1 it is not the scale"
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


SPOILED = """
import os, runpy, sys
sys.path.insert(0, "src")
from trainer.grpo_trainer import AudioGRPOTrainer
compute_loss, spoiled = AudioGRPOTrainer.compute_loss, set()
def compute(self, *args, **kwargs):
    step = self.state.global_step + 1
    bad = step in (2, 4, 5) and step not in spoiled and os.environ["RANK"] == "1"
    spoiled.add(step)
    return compute_loss(self, *args, **kwargs) * (float("nan") if bad else 1.0)
AudioGRPOTrainer.compute_loss = compute
runpy.run_path("src/train.py", run_name="__main__")
"""
REWARD = "def mine(completions, **_):\n    return [float(i + len(text)) for i, text in enumerate(completions)]\n"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ds_zero2", "ds_zero3"])  # without: a fault in test_faults.py
def test_the_gradient_of_one_process_stops_all_from_stepping(small_model, questions, tmp_path, engine):
    skip_without_compiler(engine)
    (tmp_path / "spoiled.py").write_text(SPOILED)
    (tmp_path / "reward.py").write_text(REWARD)
    out = tmp_path / "out"
    flags = (
        "--use_cpu", "true", "--questions_per_step", "4", "--num_generations", "2", "--max_completion_length", "4",
        "--learning_rate", "1e-2", "--save_steps", "1", "--max_steps", "8", "--max_skipped", "2", "--report_to", "none",
        "--keep_optimizer", "all", "--disable_tqdm", "true", "--model_name_or_path", small_model, "--output_dir", out,
        "--data_file", questions, "--reward_funcs", f"{tmp_path}/reward.py:mine",
    )  # fmt: skip
    places = dict(GPU_NUM=2, CONFIG=f"conf/{engine}.json" if engine else "")
    done = run("python", "src/run/launch.py", tmp_path / "spoiled.py", *flags, check=False, **places)
    assert done.returncode == 2 and done.stdout.count("--max_skipped") == 1, done.stdout
    weights = [load_file(path / "model.safetensors") for path in checkpoints_in(out)]
    assert len(weights) == 4, "the run ends in step 5"
    assert [same(*pair) for pair in zip(weights, weights[1:], strict=False)] == [True, False, True]
    assert all(value.isfinite().all() for found in weights for value in found.values())
    entries = [entry for entry in log_of(out) if "skipped_steps" in entry]
    assert [entry["skipped_steps"] for entry in entries] == [0, 1, 1, 2]
    rates = [entry["learning_rate"] for entry in entries]
    assert rates == pytest.approx([1e-2 * left / 8 for left in (8, 7, 6, 5)]), "the schedule advances"
