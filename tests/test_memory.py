"""The memory of a run as it is calculated, held against what the trainer's real steps hold."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, Qwen2AudioForConditionalGeneration, TrainingArguments
from trl import GRPOConfig

from conftest import QUESTION, write_tone
from dataset.dataset import load_train_dataset
from model.qwen2_audio import load_processor
from model.without_storage import PeakMemory
from trainer import memory
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.memory import Estimate, Settings, estimate
from trainer.sft_trainer import AudioSFTTrainer, count_longest_answer

pytestmark = pytest.mark.slow  # a minute on two cores

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
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_train_dataset(folder / "train.jsonl")


def by_turns(completions, **kwargs) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def hold_two_steps(small_model, rows, folder, settings: Settings) -> tuple[Estimate, int]:
    """What is calculated of a run, and the most bytes that the tensors of its first two steps hold at one time, rollout
    to optimizer. The second step has the optimizer's state from the first."""
    args = GRPOConfig(
        str(folder), num_generations=settings.generations, max_completion_length=settings.completion,
        per_device_train_batch_size=settings.generations * settings.questions, beta=settings.beta,
        gradient_accumulation_steps=settings.steps_per_generation, activation_checkpointing=settings.checkpointing,
        gradient_checkpointing=settings.checkpointing, generation_kwargs={"min_new_tokens": settings.completion},
        bf16=False, use_cpu=True, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    targets = list(settings.lora_targets)
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM") if settings.lora_r else None
    trainer = AudioGRPOTrainer(str(small_model), [by_turns], args, rows, peft_config=lora, freeze=settings.freeze)
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    with PeakMemory([tensor for model in models for tensor in (*model.parameters(), *model.buffers())]) as memory:
        trainer.train()
    settings = replace(settings, prompt=trainer._questions.input_ids.shape[1])
    return estimate(trainer.model.config, settings), memory.peak


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="full"),
        pytest.param({"checkpointing": True}, id="full, checkpointing", marks=pytest.mark.slow),
        pytest.param({"lora_r": 4}, id="LoRA", marks=pytest.mark.slow),
        pytest.param({"lora_r": 4, "checkpointing": True}, id="LoRA, checkpointing", marks=pytest.mark.slow),
        pytest.param(
            {"beta": 0.0, "checkpointing": True, "questions": 1, "steps_per_generation": 4},
            id="no reference", marks=pytest.mark.slow,
        ),
        pytest.param({"freeze": ("audio_encoder",)}, id="frozen encoder", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_total_is_what_two_real_steps_hold_at_most(small_model, two_seconds, tmp_path, change):
    """With accumulated passes, on a CPU, in float32, without an engine: the one total against the one peak, which says
    nothing of the parts alone, nor of what a GPU's allocator takes beyond its tensors."""
    found, peak = hold_two_steps(small_model, two_seconds, tmp_path, replace(SMALL, **change))
    assert found.total == pytest.approx(peak, rel=0.1), found


def test_without_accumulation_the_total_is_an_upper_bound(small_model, two_seconds, tmp_path):
    """Gradients come as activations go; the estimate has all of both at one time."""
    settings = replace(SMALL, questions=1, steps_per_generation=1, checkpointing=True)
    found, peak = hold_two_steps(small_model, two_seconds, tmp_path, settings)
    assert peak <= found.total <= peak + found.gradients, found


def test_of_supervised_steps_too(small_model, two_seconds, tmp_path):
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True, bf16=False,
        report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    processor = load_processor(small_model)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    trainer = AudioSFTTrainer(model, args, two_seconds, processor)
    with PeakMemory([*trainer.model.parameters(), *trainer.model.buffers()]) as held:
        trainer.train()
    ids = trainer.data_collator([two_seconds[0]])["input_ids"]
    answer = count_longest_answer(two_seconds, processor)
    settings = replace(SMALL, supervised=True, completion=answer, prompt=ids.shape[1] - answer)
    found = estimate(trainer.model.config, settings)
    assert found.rollout == found.reference == 0
    assert found.total == pytest.approx(held.peak, rel=0.1), found


@pytest.mark.parametrize("change", [{}, {"lora_r": 4, "checkpointing": True}, {"supervised": True}], ids=str)
def test_a_deep_model_follows_from_shallow_ones(small_model, monkeypatch, change):
    config = AutoConfig.from_pretrained(small_model)
    config.text_config.num_hidden_layers, config.audio_config.encoder_layers = 6, 5
    config.text_config.layer_types = ["full_attention"] * 6
    settings = replace(SMALL, prompt=120, **change)
    found = estimate(config, settings)
    monkeypatch.setattr(memory, "FEW", 6)
    assert estimate(config, settings) == found


def sizes(**changes) -> Estimate:
    zeros = dict.fromkeys(Estimate.__dataclass_fields__, 0) | {"settings": Settings()}
    return Estimate(**zeros | changes)


def test_the_largest_of_the_three_phases_counts():
    found = sizes(weights=6, reference=6, rollout=3, activations=9, step=2)
    assert found.total == 21
    assert found.fits(23) and not found.fits(22)


ENGINE = replace(SMALL, dtype=torch.bfloat16, prompt=120, questions=1, steps_per_generation=1, zero_stage=2)


def test_engines_divide_what_they_divide(small_model):
    config = AutoConfig.from_pretrained(small_model)
    one, two, three = (estimate(config, replace(ENGINE, processes=4, zero_stage=n)) for n in (1, 2, 3))
    assert two.gradients == one.gradients // 4 and two.optimizer == one.optimizer and two.weights == one.weights
    assert three.weights == two.weights // 4 and three.reference == two.reference // 4
    alone = estimate(config, ENGINE)
    assert alone.optimizer == pytest.approx(4 * two.optimizer, abs=4) and alone.weights == two.weights
    offloaded = estimate(config, replace(ENGINE, offload_optimizer=True))
    assert offloaded.optimizer == offloaded.gradients == 0 and offloaded.host >= alone.optimizer + alone.gradients
    waiting = estimate(config, replace(ENGINE, ref_offload=True))
    assert waiting.reference == 0 and waiting.host == alone.reference < waiting.asking
    assert waiting.total < alone.total and waiting.activations == alone.activations
    adapters = estimate(config, replace(ENGINE, lora_r=4))
    assert adapters.reference == 0 and adapters.optimizer < alone.optimizer / 5 and adapters.weights > alone.weights
