"""An encoder of which nothing is trained runs once per question, in the rollout; losses, gradients and weights are those
of a run in which it runs in every pass."""

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig

from arguments import AudioModelConfig
from dataset.dataset import load_train_dataset
from test_grpo_trainer import first_rows, length_reward
from trainer.grpo_trainer import AudioGRPOTrainer

EVERYWHERE = AudioModelConfig().lora_target_modules
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
    """Two steps on one batch of rollouts (`num_iterations`), so that the second's gradients tell of the first's."""
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
        # Of 2 questions: the rollout; and else old log-probs, reference, and two iterations, recomputed or not.
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
    """The default targets reach into it."""
    trainer = make_trainer(small_model, questions, tmp_path, EVERYWHERE, [], max_steps=1)
    rows = watch_encoders(trainer)
    trainer.train()
    assert sum(rows) == 3
    assert any("audio_tower" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_frozen_adapters_stay_frozen_after_the_references_pass(small_model, questions, tmp_path):
    """PEFT switches all adapters off for it, and then all on again: their gradients would count where they are clipped."""
    trainer = make_trainer(small_model, questions, tmp_path, EVERYWHERE, ["language_model"])
    trainer.model.train()
    trainer._generate_and_score_completions(first_rows(trainer, 2, 4))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and "audio_tower" in name for name in trained)


def test_clips_of_other_lengths_are_padded_with_their_questions(small_model, questions, tmp_path):
    """A uniform group's clip gives way to a longer one."""
    trainer = make_trainer(small_model, questions, tmp_path, None, ["audio_encoder"])
    trainer.reward_funcs = [
        lambda completions, audio_path, **_: [float(i % 2 * (p[-5] in "67")) for i, p in enumerate(audio_path)]
    ]
    trainer.max_resample_rounds = 8
    trainer.model.train()
    rows = watch_encoders(trainer)
    batch = trainer._generate_and_score_completions(first_rows(trainer, 2, 4))
    assert len(rows) >= 4 and trainer._metrics["train"]["groups/uniform_share_left"] == [0]
    tokens = (batch["prompt_ids"][:, 0] == trainer.model.config.audio_token_id).sum(dim=1).tolist()
    for clip, count in zip(batch["encoded_clips"], tokens, strict=True):  # (W, A)
        assert (clip[:, :count] != 0).any(dim=0).all() and (clip[:, count:] == 0).all()
    trainer.current_gradient_accumulation_steps, rows[:] = 1, []
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch)) and not rows
