"""The calculated memory of a run (`benchmarks/memory_table.py`) against what the trainer's real steps hold."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig
from trl import GRPOConfig

import memory_table
from conftest import QUESTION, write_rows, write_tone
from dataset.dataset import load_train_dataset
from memory_table import Estimate, Settings, estimate
from run.arguments import LINEAR_LAYERS
from trainer.grpo_trainer import AudioGRPOTrainer
from without_storage import PeakMemory

SMALL = Settings(
    dtype=torch.float32, seconds=2, completion=8, generations=4, questions=2, steps_per_generation=2, beta=0.1
)


@pytest.fixture(scope="module")
def two_seconds(tmp_path_factory):
    """Training rows whose clips are all of one length."""
    folder = tmp_path_factory.mktemp("two_seconds")
    rows = [QUESTION | {"id": i, "answer": 0, "audio_path": f"{i}.wav"} for i in range(4)]
    for row in rows:
        write_tone(folder / row["audio_path"], seconds=2.0, frequency=300 * (row["id"] + 1))
    return load_train_dataset(write_rows(folder, *rows))


def by_turns(completions, **kwargs) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def hold_two_steps(small_model, rows, folder, settings: Settings) -> tuple[Estimate, int]:
    """The estimate of a run, and the most bytes that tensors hold at one time in its first two steps. The second step
    has the optimizer's state of the first."""
    args = GRPOConfig(
        str(folder), num_generations=settings.generations, max_completion_length=settings.completion,
        per_device_train_batch_size=settings.generations * settings.questions, beta=settings.beta,
        gradient_accumulation_steps=settings.steps_per_generation, activation_checkpointing=settings.checkpointing,
        gradient_checkpointing=settings.checkpointing, generation_kwargs={"min_new_tokens": settings.completion},
        bf16=False, use_cpu=True, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=list(LINEAR_LAYERS), task_type="CAUSAL_LM") if settings.lora_r else None
    trainer = AudioGRPOTrainer(str(small_model), [by_turns], args, rows, peft_config=lora)
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    with PeakMemory([tensor for model in models for tensor in (*model.parameters(), *model.buffers())]) as memory:
        trainer.train()
    _, questions = trainer.load([rows[0]])
    settings = replace(settings, prompt=questions.input_ids.shape[1])
    return estimate(trainer.model.config, settings), memory.peak


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="full"),
        pytest.param({"lora_r": 4, "checkpointing": True}, id="LoRA, checkpointing"),
        pytest.param({"beta": 0.0, "questions": 1, "steps_per_generation": 4}, id="no KL", marks=pytest.mark.slow),
    ],
)
def test_the_total_is_what_two_real_steps_hold_at_most(small_model, two_seconds, tmp_path, change):
    """With accumulated passes, on a CPU, in float32, without an engine."""
    found, peak = hold_two_steps(small_model, two_seconds, tmp_path, replace(SMALL, **change))
    assert found.total == pytest.approx(peak, rel=0.1), found


def test_without_accumulation_the_total_is_an_upper_bound(small_model, two_seconds, tmp_path):
    """Gradients are allocated as activations are freed; the estimate counts all of both."""
    settings = replace(SMALL, questions=1, steps_per_generation=1, checkpointing=True)
    found, peak = hold_two_steps(small_model, two_seconds, tmp_path, settings)
    assert peak <= found.total <= 1.1 * peak, found


@pytest.mark.slow
def test_a_deep_model_follows_from_shallow_ones(small_model, monkeypatch):
    config = AutoConfig.from_pretrained(small_model)
    config.text_config.num_hidden_layers, config.audio_config.encoder_layers = 6, 5
    config.text_config.layer_types = ["full_attention"] * 6
    settings = replace(SMALL, prompt=120, lora_r=4, checkpointing=True)
    found = estimate(config, settings)
    monkeypatch.setattr(memory_table, "FEW", 6)
    assert estimate(config, settings) == found


def test_the_largest_of_the_three_phases_counts():
    zeros = dict.fromkeys(Estimate.__dataclass_fields__, 0)
    found = Estimate(**zeros | dict(weights=6, reference=6, rollout=3, activations=9, step=2))
    assert found.total == 21
    assert found.fits(23) and not found.fits(22)


def test_engines_divide_what_they_divide(small_model):
    config = AutoConfig.from_pretrained(small_model)
    settings = replace(SMALL, dtype=torch.bfloat16, prompt=120, questions=1, steps_per_generation=1, zero_stage=2)
    alone, divided = (estimate(config, replace(settings, processes=n)) for n in (1, 4))
    assert divided.gradients == alone.gradients // 4 and divided.weights == alone.weights
    assert alone.optimizer == pytest.approx(4 * divided.optimizer, abs=4)
    three = estimate(config, replace(settings, processes=4, zero_stage=3))
    assert three.weights == divided.weights // 4 and three.reference == divided.reference // 4
    offloaded = estimate(config, replace(settings, offload_optimizer=True))
    assert offloaded.optimizer == offloaded.gradients == 0 and offloaded.host >= alone.optimizer + alone.gradients
    adapters = estimate(config, replace(settings, lora_r=4))
    assert adapters.reference == 0 and adapters.optimizer < alone.optimizer / 5 and adapters.weights > alone.weights
