"""Groups whose gradient is exactly zero cost no pass: gradients and metrics are those of a run that passes them all."""

import json

import pytest
import torch
from transformers import TrainerCallback

from running import free_port, run, skip_without_compiler
from test_grpo_trainer import first_rows, make_trainer
from test_resample import only_some
from trainer import grpo_trainer

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


class KeepGradients(TrainerCallback):
    """Those that each step was taken along; None where there was none."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = model.named_parameters()
        self.steps.append({name: p.grad if p.grad is None else p.grad.clone() for name, p in named})


def train(model, data, folder, useful: str, **settings):
    """Steps of four questions; gradients, logged metrics, and the tokens that went through the policy's passes."""
    defaults = dict(beta=0.0, max_grad_norm=1e9, save_strategy="no", optim="sgd", max_steps=1)
    trainer = make_trainer(model, data, folder, rewards=[only_some(set(useful))], **defaults | settings)
    kept, tokens = KeepGradients(), []

    def count(module, args, kwargs):
        if torch.is_grad_enabled():
            tokens.append(kwargs["inputs_embeds"][..., 0].numel())

    trainer.model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.add_callback(kept)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return kept.steps, logged, tokens


def assert_the_same(found, expected):
    for step, reference in zip(found[0], expected[0], strict=True):
        for name, gradient in reference.items():
            assert (step[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(step[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    for entry, reference in zip(found[1], expected[1], strict=True):
        assert set(entry) - set(reference) == {"groups/no_pass_share"}
        for key in set(reference) - {"step_time", "data_time"}:
            assert entry[key] == pytest.approx(reference[key], rel=1e-5, abs=1e-7, nan_ok=True), key


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_and_metrics_of_every_loss(small_model, questions, tmp_path, monkeypatch, loss, groups):
    settings = dict(loss_type=loss, per_device_train_batch_size=4 * groups, gradient_accumulation_steps=4 // groups)
    settings |= dict(temperature=0.7)
    found = train(small_model, questions, tmp_path, "135", **settings)
    monkeypatch.setattr(grpo_trainer, "adds_nothing", lambda trainer: False)
    expected = train(small_model, questions, tmp_path, "135", **settings)
    assert_the_same(found, expected)
    share = found[1][0]["groups/no_pass_share"]
    assert 0 < share < 1 and found[1][0]["grad_norm"] > 1e-3, "nothing was left out, or nothing left"
    assert sum(found[2]) < (1.1 - share) * sum(expected[2])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_steps_of_idle_groups_alone(small_model, questions, tmp_path, monkeypatch, optimizer):
    """Their gradient is zero, not missing: Adam goes on by its momentum."""
    settings = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, optim=optimizer)
    found = train(small_model, questions, tmp_path, "3", **settings)
    monkeypatch.setattr(grpo_trainer, "adds_nothing", lambda trainer: False)
    expected = train(small_model, questions, tmp_path, "3", **settings)
    assert_the_same(found, expected)
    shares = [entry["groups/no_pass_share"] for entry in found[1]]
    assert 1.0 in shares and min(shares) < 1
    assert min(found[2]) == 3 - 1, "an idle step's one pass is over the prompt's last tokens"
    assert len(found[2]) == 4 < len(expected[2])


@pytest.mark.parametrize(
    "settings",
    [
        dict(beta=1e-3),
        dict(top_entropy_quantile=0.5),
        dict(entropy_coef=0.1),
        dict(num_iterations=2, gradient_accumulation_steps=1),
    ],
)
def test_settings_that_need_every_group_pass_every_group(small_model, questions, tmp_path, settings):
    trainer = make_trainer(small_model, questions, tmp_path, rewards=[only_some(set())], **{"beta": 0.0} | settings)
    trainer.model.train()
    assert "idle" not in trainer._generate_and_score_completions(first_rows(trainer, 2, 4))


def steps_of_two_processes(model, data, folder, engine: str, beta: str) -> list[dict]:
    """What three steps log in which processes have idle groups of different numbers."""
    (folder / "rewards.py").write_text(
        "def some(completions, audio_path, **kwargs):\n"
        "    return [float(i % 2) if path[-5] in '137' else 0.0 for i, path in enumerate(audio_path)]\n"
    )
    run(
        "sh", "run_grpo.sh", "--use_cpu", "true", "--max_steps", "3", "--questions_per_step", "8", "--num_generations", "2",
        "--max_completion_length", "4", "--save_strategy", "no", "--beta", beta, "--dtype", "float32", "--bf16", "false",
        "--learning_rate", "1e-3", "--reward_funcs", f"{folder}/rewards.py:some",
        MODEL_NP=model, DATA_FILE=data, OUT_DIR=folder / "out", MASTER_PORT=free_port(), GPU_NUM=2, timeout=300,
        CONFIG=f"conf/{engine}.json" if engine else "",
    )  # fmt: skip
    return [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()][:3]


@pytest.fixture(scope="module")
def steps_with_every_pass(small_model, questions, tmp_path_factory):
    """A beta that is lost in rounding, but for which every group has its pass."""
    return steps_of_two_processes(small_model, questions, tmp_path_factory.mktemp("all"), "", beta="1e-30")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["", "ds_zero2", "ds_zero3"])
def test_two_processes_learn_the_same_under_every_engine(
    steps_with_every_pass, small_model, questions, tmp_path, engine
):
    skip_without_compiler(engine)
    found = steps_of_two_processes(small_model, questions, tmp_path, engine, beta="0")
    for step, expected in zip(found, steps_with_every_pass, strict=True):
        assert step["groups/no_pass_share"] == pytest.approx(expected["frac_reward_zero_std"]) and expected["grad_norm"]
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert step["reward"] == expected["reward"] and step["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        # The mean over micro-batches, which other groups make up: those of both processes with fewest passes come first.
        assert step["entropy"] == pytest.approx(expected["entropy"], rel=0.02)
