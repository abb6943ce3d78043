"""LoRA on a base model of 4 bits (bitsandbytes, which runs on a CPU too): what is stored how, trained, saved and loaded.

An optional package: python -m pip install bitsandbytes==0.50.2. Without it the tests are skipped."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration

import row_by_row
import train
import train_sft
from dataset.dataset import load_train_dataset
from evaluation.checkpoints import load_model
from model.qwen2_audio import base_model, load_processor
from run.arguments import parse
from run.startup import Prepared
from test_grpo_trainer import roll_out

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, an optional package, which is not installed")


PARTS = {
    train: (train.DataArguments, train.RewardArguments, train.RecipeConfig, train.AudioModelConfig),
    train_sft: (train_sft.ChoiceDataArguments, train_sft.SFTRecipeConfig, train_sft.AudioModelConfig),
}


def build(module, small_model, questions, folder, *flags: str):
    parsed = parse(
        PARTS[module],
        argv=[
            "--use_cpu", "true", "--load_in_4bit", "true", "--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0",
            "--model_name_or_path", str(small_model), "--output_dir", str(folder), "--max_steps", "2", "--save_steps", "2",
            "--questions_per_step", "2", "--learning_rate", "1e-2", "--report_to", "none", *flags,
        ],
    )  # fmt: skip
    dataset = load_train_dataset(questions, parsed[0].prompt_style)
    return module.build(Prepared(str(small_model), dataset, load_processor(small_model), None, None, {}), *parsed)


@pytest.fixture
def grpo(small_model, questions, tmp_path):
    flags = ("--num_generations", "4", "--max_completion_length", "8", "--beta", "0.1")
    return build(train, small_model, questions, tmp_path, *flags)


def test_only_the_language_models_layers_are_quantised(grpo):
    base = base_model(grpo.model)
    few_bits = {name for name, weight in base.named_parameters() if weight.dtype == torch.uint8}
    assert len(few_bits) == 7 * base.config.text_config.num_hidden_layers
    assert all(name.startswith("model.language_model.layers.") for name in few_bits)
    trained = {name: weight.dtype for name, weight in grpo.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name and dtype == torch.float32 for name, dtype in trained.items())
    assert any("audio_tower" in name for name in trained)


def test_the_shared_prompt_equals_row_by_row_and_the_reference_is_the_base(grpo):
    for name, parameter in grpo.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    rollout = roll_out(grpo, 2)
    prompts, ids, mask = row_by_row.as_inputs(rollout.questions), rollout.ids, rollout.mask
    with torch.no_grad():
        adapted = row_by_row.log_probs(grpo.model, prompts, ids, mask)
        packed, _ = grpo.log_probs(grpo.model, rollout)
        with grpo.model.disable_adapter():
            expected = row_by_row.log_probs(grpo.model, prompts, ids, mask)
    torch.testing.assert_close(packed * mask, adapted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.ref_logps * mask, expected, atol=1e-4, rtol=1e-4)
    assert (adapted - expected).abs().max() > 0.05


@pytest.mark.parametrize("module", [train, train_sft])
def test_it_trains_and_the_adapter_loads_on_the_base_in_full_precision(small_model, questions, tmp_path, module):
    flags = ("--num_generations", "4", "--max_completion_length", "8", "--beta", "0.1") if module is train else ()
    trainer = build(module, small_model, questions, tmp_path, *flags)
    if module is train:  # rewards of random weights are all 0
        trainer.reward_funcs[0] = lambda completions, **kwargs: [len(set(text)) / 8 for text in completions]
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all("lora_" in name for name in changed)
    adapter = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)

    loaded = load_model(tmp_path / "checkpoint-2", torch.float32, torch.device("cpu"))  # as evaluation does
    base = Qwen2AudioForConditionalGeneration.from_pretrained(small_model).state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj"
    down, up = (adapter[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    scale = trainer.model.peft_config["default"].lora_alpha / 4
    torch.testing.assert_close(loaded.state_dict()[f"{name}.weight"], base[f"{name}.weight"] + scale * up @ down)
