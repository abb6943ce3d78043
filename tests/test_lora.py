"""GRPO with adapters: the base model is the reference, checkpoints hold the adapter, and merge into a full model."""

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
from trl import GRPOConfig

import row_by_row
from arguments import AudioModelConfig
from dataset.dataset import load_train_dataset
from dataset.prompt import load_style
from merge_lora import merge
from model.checkpoints import load_merged
from running import free_port, run
from test_grpo_trainer import first_rows, length_reward
from trainer.grpo_trainer import AudioGRPOTrainer

TARGETS = AudioModelConfig().lora_target_modules


@pytest.fixture
def trainer(small_model, questions, tmp_path):
    args = GRPOConfig(
        str(tmp_path / "out"), num_generations=4, per_device_train_batch_size=8, max_completion_length=8, beta=0.1,
        learning_rate=1e-2, bf16=False, use_cpu=True, report_to="none", max_steps=2, save_steps=2, save_only_model=True,
    )  # fmt: skip
    return AudioGRPOTrainer(
        str(small_model), [length_reward], args, load_train_dataset(questions),
        peft_config=LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )  # fmt: skip


def test_the_reference_is_the_base_model_with_the_adapter_off(trainer, small_model):
    assert trainer.ref_model is None, "a second copy of the model in memory"
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # starts at 0, where adapter on and off are the same
            parameter.data.normal_(0, 0.2, generator=generator)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(first_rows(trainer, 2, 4))
    base = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    prompts, ids, mask = row_by_row.as_inputs(trainer._questions), batch["completion_ids"], batch["completion_mask"]
    with torch.no_grad():
        expected = row_by_row.log_probs(base, prompts, ids, mask)
        adapted = row_by_row.log_probs(trainer.model, prompts, ids, mask)
    torch.testing.assert_close(batch["ref_per_token_logps"] * mask, expected, atol=1e-4, rtol=1e-4)
    assert (adapted - expected).abs().max() > 0.05


def test_the_checkpoint_is_the_adapter_and_merges_into_what_was_trained(trainer, small_model, tmp_path):
    base_before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert "lora_" in name or torch.equal(parameter, base_before[name]), name
    folder = tmp_path / "out" / "checkpoint-2"
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert not (folder / "model.safetensors").exists() and load_style(folder) == "answer"

    merge(folder, tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
        load_file(small_model / "model.safetensors")
    )
    assert load_style(tmp_path / "merged") == "answer"
    AutoProcessor.from_pretrained(tmp_path / "merged")
    trainer.model.eval()
    trainer.model.train()
    batch = trainer._generate_and_score_completions(first_rows(trainer, 1, 4))
    prompts, ids, mask = row_by_row.as_inputs(trainer._questions), batch["completion_ids"], batch["completion_mask"]
    trainer.model.eval()
    merged = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = row_by_row.log_probs(trainer.model, prompts, ids, mask)
        torch.testing.assert_close(row_by_row.log_probs(merged, prompts, ids, mask), expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_merged_is_said(small_model, tmp_path):
    with pytest.raises(ValueError, match="no adapter checkpoint"):
        load_merged(small_model)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(
        ValueError, match="its base model .*gone cannot be loaded.*merge_lora.py takes another as --base"
    ):
        load_merged(tmp_path)
    done = run(sys.executable, "src/merge_lora.py", "--adapter", tmp_path, "--out", tmp_path, check=False)
    assert done.returncode == 1 and "is there already" in done.stdout and "Traceback" not in done.stdout


@pytest.mark.slow
def test_adapters_with_zero3_on_two_processes(small_model, questions, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("DeepSpeed compiles its CPU operators and needs g++")
    run(
        "sh", "run_grpo.sh", "--use_cpu", "true", "--use_peft", "true", "--max_steps", "2", "--save_steps", "2",
        "--questions_per_step", "2", "--num_generations", "4", "--max_completion_length", "6", "--learning_rate", "1e-2",
        MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=tmp_path, GPU_NUM=2, MASTER_PORT=free_port(),
        CONFIG="conf/ds_zero3.json",
    )  # fmt: skip
    adapter = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert adapter and all(tensor.numel() for tensor in adapter.values())
    assert load_merged(tmp_path / "checkpoint-2")
