"""The core trains without `src/run`: the trainer from code, a step, and a checkpoint that plain transformers loads."""

import shutil
import sys

import torch
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from conftest import ROOT
from running import run

SCRIPT = """
import sys
from trl import GRPOConfig

from dataset.dataset import load_train_dataset
from trainer.grpo_trainer import AudioGRPOTrainer
from utils.rewards import accuracy_reward, format_reward

def letters(completions, **kwargs):
    return [sum(c < "n" for c in text) / max(len(text), 1) for text in completions]

model, data, out = sys.argv[1:]
args = GRPOConfig(
    out, num_generations=4, per_device_train_batch_size=8, max_completion_length=8, max_steps=1, learning_rate=1e-2,
    loss_type="grpo", beta=0.04, bf16=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
)
trainer = AudioGRPOTrainer(model, [accuracy_reward, format_reward, letters], args, load_train_dataset(data))
trainer.train()
trainer.save_model()
assert trainer.state.log_history[0]["grad_norm"] > 0
assert "run" not in sys.modules
"""


def tensor_names(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_step_without_attachments(small_model, questions, tmp_path):
    source, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "run"))
    assert (source / "trainer").is_dir() and not (source / "run").exists()
    run(sys.executable, "-c", SCRIPT, small_model, questions, out, PYTHONPATH=source)
    assert tensor_names(out) == tensor_names(small_model)
    base, trained = map(Qwen2AudioForConditionalGeneration.from_pretrained, (small_model, out))
    changed = [not torch.equal(a, b) for a, b in zip(base.parameters(), trained.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
    assert AutoProcessor.from_pretrained(out).chat_template
