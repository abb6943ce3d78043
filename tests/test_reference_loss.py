"""Log-probs, loss and every gradient equal those that the original code gave on two fixed batches."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration
from trl import GRPOConfig
from trl.trainer.utils import add_fused_lm_head

import row_by_row
from dataset.audio import load_audio
from dataset.dataset import load_train_dataset
from dataset.encode import Batch
from model.qwen2_audio import load_processor
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.rollout import Rollout
from utils.rewards import accuracy_reward, format_reward


@pytest.fixture(scope="module")
def recorded(shared):
    """case name -> (recorded numbers, input tensors, recorded gradients)"""
    folder = shared / "fixtures" / "loss"
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return folder, {
        name: (cases[name], np.load(folder / f"inputs_{name}.npz"), load_file(folder / f"grads_{name}.safetensors"))
        for name in ("b1_g8", "b2_g4_fixed")
    }


def make_trainer(folder, output_dir, case) -> AudioGRPOTrainer:
    args = GRPOConfig(
        str(output_dir),
        num_generations=case["G"],
        per_device_train_batch_size=case["G"] * len(case["rows"]),
        beta=case["beta"],
        loss_type="grpo",
        use_bias_correction_kl=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = AudioGRPOTrainer(
        str(folder / "nano-Qwen2-Audio-policy"),
        [accuracy_reward, format_reward],
        args=args,
        train_dataset=load_train_dataset(folder / "data.jsonl"),
    )
    # The recorded reference is another model than the policy's start.
    trainer.ref_model = Qwen2AudioForConditionalGeneration.from_pretrained(folder / "nano-Qwen2-Audio-ref")
    add_fused_lm_head(trainer.ref_model)
    return trainer.model.train() and trainer


def restore_features(arrays) -> torch.Tensor:
    """(N, M, 3000) mel features from the recorded first 256 frames and the value that fills the rest."""
    first = torch.from_numpy(arrays["input_features"])
    rest = torch.from_numpy(arrays["input_features_pad_value"])[:, :, None]
    return torch.cat([first, rest.expand(-1, -1, 3000 - first.shape[2])], dim=2)


def restore_rollout(case, arrays) -> Rollout:
    """The recorded batch, without the reference's log-probs."""
    groups = (len(case["rows"]), case["G"])
    lengths = torch.tensor(case["completion_mask_sum"]).view(groups)
    ids = torch.from_numpy(arrays["completion_ids"]).unflatten(0, groups)
    questions = Batch(
        torch.from_numpy(arrays["prompt_ids"]),
        torch.from_numpy(arrays["prompt_attention_mask"]),
        restore_features(arrays),
        arrays["feature_attention_mask"].sum(axis=1).tolist(),
    )
    return Rollout(
        rows=[{} for _ in case["rows"]],
        questions=questions,
        ids=ids,
        mask=(torch.arange(ids.shape[2]) < lengths[..., None]).long(),
        lengths=lengths,
        ended=torch.ones_like(lengths, dtype=torch.bool),
        rewards=torch.tensor(case["rewards_per_func"]).unflatten(0, groups),
        advantages=torch.tensor(case["advantages"]).view(groups),
    )


@pytest.mark.parametrize("name", ["b1_g8", "b2_g4_fixed"])
def test_loss_and_gradients_equal_the_originals(recorded, tmp_path, name):
    folder, cases = recorded
    case, arrays, gradients = cases[name]
    trainer = make_trainer(folder, tmp_path, case)
    rollout = restore_rollout(case, arrays)
    with torch.no_grad():
        policy, _ = trainer.log_probs(trainer.model, rollout)
        rollout.ref_logps = trainer.reference_log_probs(rollout)
    mask = rollout.mask.flatten(0, 1).bool()
    for computed, key in ((policy, "per_token_logps"), (rollout.ref_logps, "ref_per_token_logps")):
        torch.testing.assert_close(computed.flatten(0, 1)[mask], torch.tensor(case[key])[mask], atol=1e-4, rtol=0)

    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, rollout)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
    loss.backward()

    # Under the base checkpoint's names, as the gradients were recorded.
    trainer.save_model(tmp_path / "saved")
    saved_names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    trained = {to_base_name(n): p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(trained) == set(gradients), "the set of trained tensors differs from the original's"
    assert set(trained) | {"audio_tower.embed_positions.weight"} == saved_names
    for tensor_name, expected in gradients.items():
        difference = (trained[tensor_name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert difference < 1e-4, f"{tensor_name}: {difference:.2e}"


def to_base_name(name: str) -> str:
    """A parameter's name in transformers 5 -> its name in Qwen2-Audio's checkpoint."""
    if name.startswith("lm_head"):
        return "language_model." + name
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def test_features_and_rewards_equal_the_originals(recorded):
    folder, cases = recorded
    case, arrays, _ = cases["b2_g4_fixed"]
    dataset = load_train_dataset(folder / "data.jsonl").select(case["rows"])
    processor = load_processor(folder / "nano-Qwen2-Audio-policy")
    encoded = row_by_row.encode(
        processor, list(dataset["prompt"]), [load_audio(path) for path in dataset["audio_path"]]
    )
    np.testing.assert_array_equal(encoded["input_ids"], arrays["prompt_ids"])
    np.testing.assert_array_equal(encoded["attention_mask"], arrays["prompt_attention_mask"])
    np.testing.assert_array_equal(encoded["feature_attention_mask"], arrays["feature_attention_mask"])
    np.testing.assert_allclose(encoded["input_features"], restore_features(arrays), atol=1e-4)
    solutions = [s for s in dataset["solution"] for _ in range(case["G"])]
    rewards = zip(
        accuracy_reward(case["decoded"], solutions),
        format_reward(case["decoded"], ["answer"] * len(solutions)),
        strict=True,
    )
    assert [list(pair) for pair in rewards] == case["rewards_per_func"]
