"""A frozen encoder runs once per question, in the rollout. Losses, gradients and weights are those of a run in which it
runs in every pass."""

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig

from dataset.dataset import load_train_dataset
from run.arguments import LINEAR_LAYERS
from run.resample import resample_uniform_groups
from runs import length_reward
from test_grpo_trainer import roll_out
from trainer.grpo_trainer import AudioGRPOTrainer

EVERYWHERE = list(LINEAR_LAYERS)
LANGUAGE_MODEL = r".*language_model.*\.(q|v|down)_proj"


def make_trainer(small_model, questions, folder, targets, freeze, **settings) -> AudioGRPOTrainer:
    args = GRPOConfig(
        str(folder), num_generations=4, per_device_train_batch_size=4, max_completion_length=8, learning_rate=1e-2,
        bf16=False, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, beta=0.1,
        **settings,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM") if targets else None
    data = load_train_dataset(questions)
    return AudioGRPOTrainer(str(small_model), [length_reward], args, data, freeze=freeze, peft_config=lora)


def watch_encoders(trainer) -> list[int]:
    """The number of clips in each of the encoder's passes from now on, the policy's or the reference's."""
    rows: list[int] = []
    for model in filter(None, (trainer.model, trainer.ref_model)):
        convolution = next(module for name, module in model.named_modules() if name.endswith("audio_tower.conv1"))
        convolution.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    return rows


@pytest.mark.parametrize(
    ("targets", "freeze", "checkpointing"),
    [
        pytest.param(None, ["audio_encoder"], False, id="frozen"),
        pytest.param(LANGUAGE_MODEL, [], True, id="adapters on the language model, checkpointing"),
        pytest.param(EVERYWHERE, ["audio_encoder"], False, id="adapters, those of the encoder frozen"),
    ],
)
def test_it_runs_once_and_the_run_is_bitwise_the_same(small_model, questions, tmp_path, targets, freeze, checkpointing):
    """The second step is on the same rollouts: its losses depend on the gradients of the first."""
    found = []
    for once in (True, False):
        trainer = make_trainer(
            small_model, questions, tmp_path, targets, freeze, max_steps=2, gradient_accumulation_steps=2,
            num_iterations=2, activation_checkpointing=checkpointing,
        )  # fmt: skip
        assert trainer.encodes_once
        trainer.encodes_once = once
        rows = watch_encoders(trainer)
        trainer.train()
        # 2 questions: in the rollout only, or also for old log-probs, the reference and two iterations.
        assert sum(rows) == 2 if once else sum(rows) >= 2 * 5
        steps = [
            {key: value for key, value in entry.items() if "time" not in key and "second" not in key}
            for entry in trainer.state.log_history
        ]
        assert steps[1]["grad_norm"] > 0 and steps[1]["kl"] > 0
        found.append((steps, trainer.model.state_dict()))
    (steps, weights), (expected, plain) = found
    assert steps == expected
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights.items())


def test_an_encoder_with_adapters_that_are_trained_runs_in_every_pass(small_model, questions, tmp_path):
    """The default targets include the encoder's layers."""
    trainer = make_trainer(small_model, questions, tmp_path, EVERYWHERE, [], max_steps=1)
    rows = watch_encoders(trainer)
    trainer.train()
    assert sum(rows) == 3
    assert any("audio_tower" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_frozen_adapters_stay_frozen_after_the_references_pass(small_model, questions, tmp_path):
    """PEFT makes all adapters trainable after that pass: their gradients would count in gradient clipping."""
    trainer = make_trainer(small_model, questions, tmp_path, EVERYWHERE, ["language_model"])
    roll_out(trainer, 2)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and "audio_tower" in name for name in trained)


def test_encoded_clips_of_different_lengths_are_joined(small_model, questions, tmp_path):
    """A longer clip replaces that of a uniform group."""
    trainer = make_trainer(small_model, questions, tmp_path, None, ["audio_encoder"])
    trainer.reward_funcs = [
        lambda completions, audio_path, **_: [float(i % 2 * (p[-5] in "67")) for i, p in enumerate(audio_path)]
    ]
    resample_uniform_groups(trainer, rounds=8)
    rows = watch_encoders(trainer)
    rollout = roll_out(trainer, 2)
    assert len(rows) >= 4 and not (rollout.advantages == 0).all(dim=1).any()
    clips, ids = rollout.questions.input_features, rollout.questions.input_ids
    assert rollout.questions.encoded and len(clips) == 2
    tokens = (ids == trainer.model.config.audio_token_id).sum(dim=1).tolist()
    for clip, count in zip(clips, tokens, strict=True):  # (W, A)
        assert (clip[:, :count] != 0).any(dim=0).all() and (clip[:, count:] == 0).all()
    rows.clear()
    trainer.current_gradient_accumulation_steps = 1
    rollout.mean_tokens = rollout.mask.sum()
    assert torch.isfinite(trainer.compute_loss(trainer.model, rollout)) and not rows
