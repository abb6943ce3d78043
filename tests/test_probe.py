"""The largest micro-batch before step 1, which must leave no trace in the run; and what a run out of memory says."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, Qwen2AudioForConditionalGeneration, TrainingArguments
from trl import GRPOConfig

from dataset.dataset import load_train_dataset
from model.qwen2_audio import load_processor
from running import run, skip_without_compiler
from test_grpo_trainer import length_reward
from trainer import probe
from trainer.fitting import size
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.memory import Settings, estimate
from trainer.probe import ProbeFirst, explain_out_of_memory
from trainer.sft_trainer import AudioSFTTrainer

GRPO = Settings(
    dtype=torch.float32, prompt=160, seconds=2, completion=8, generations=4, questions=1, steps_per_generation=2, beta=0.1
)  # fmt: skip
SFT = replace(GRPO, supervised=True, questions=2, completion=5)


def grpo_trainer(small_model, questions, folder, **kwargs) -> AudioGRPOTrainer:
    args = GRPOConfig(
        str(folder), num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, beta=0.1,
        max_completion_length=8, learning_rate=1e-2, bf16=False, use_cpu=True, report_to="none", max_steps=2,
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = AudioGRPOTrainer(str(small_model), [length_reward], args, load_train_dataset(questions), **kwargs)
    trainer.memory_settings = GRPO
    return trainer


def sft_trainer(small_model, questions, folder) -> AudioSFTTrainer:
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, use_cpu=True,
        bf16=False, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    trainer = AudioSFTTrainer(model, args, load_train_dataset(questions), load_processor(small_model))
    trainer.memory_settings = SFT
    return trainer


class Watched(ProbeFirst):
    """Keeps what was probed, and the most bytes of all tensors that it made."""

    said = None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.said = self.trainer.describe_batch()


@pytest.mark.parametrize("make", [grpo_trainer, sft_trainer])
def test_the_run_is_bit_for_bit_the_one_without(small_model, questions, tmp_path, make):
    plain = make(small_model, questions, tmp_path / "plain")
    plain.train()
    probed = make(small_model, questions, tmp_path / "probed")  # which sets the seed
    probed.add_callback(probe := Watched(probed))
    probed.train()
    longest = {
        grpo_trainer: "1 question(s) x 4 completions, the longest prompt 160 tokens, the longest completion 8",
        sft_trainer: "2 question(s), the longest with its answer 165 tokens, an answer up to 5",
    }
    assert probe.said == f"a pass over {longest[make]}"
    expected, found = (
        [{key: value for key, value in entry.items() if "time" not in key and "second" not in key} for entry in logged]
        for logged in (plain.state.log_history, probed.state.log_history)
    )
    assert found == expected and expected[1]["grad_norm"] > 0
    weights = probed.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plain.model.state_dict().items())


def fail_in(trainer, at: int) -> None:
    """From the `at`-th of the policy's passes on, the language model finds no memory."""
    passes = []

    def count(*args):
        if torch.is_grad_enabled() and trainer.model.training:
            passes.append(1)
        if len(passes) >= at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nsecond line")

    trainer.model.model.language_model.register_forward_hook(count)


@pytest.mark.slow
def test_out_of_memory_in_a_step_says_which_and_what_to_lower(small_model, questions, tmp_path):
    trainer = grpo_trainer(small_model, questions, tmp_path)
    fail_in(trainer, at=3)
    with pytest.raises(SystemExit) as ended, explain_out_of_memory(trainer):
        trainer.train()
    first, cause, title, *offers = ended.value.code.splitlines()
    assert first.startswith("out of memory in step 2: a pass over 1 question(s) x 4 completions, the longest prompt 1")
    assert first.endswith(tuple(f"longest completion {n}" for n in range(1, 9)))
    assert cause == "CUDA out of memory. Tried to allocate 20.00 MiB."
    less = estimate(AutoConfig.from_pretrained(small_model), replace(GRPO, checkpointing=True))
    assert title.startswith("What would fit") and f"  --activation_checkpointing true: {size(less.total)}" in offers


def test_out_of_memory_in_a_rollout_and_in_supervised_training(small_model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "advise", lambda *args, **kwargs: "lower it")  # calculated in the test above
    for make, passes, said in (
        (grpo_trainer, 0, "step 1: a rollout of 2 question(s) x 4 completions, the longest prompt"),
        (sft_trainer, 4, "step 2: a pass over 2 question(s), the longest with its answer"),
    ):
        trainer = make(small_model, questions, tmp_path)
        fail_in(trainer, at=passes)
        with pytest.raises(SystemExit) as ended, explain_out_of_memory(trainer):
            trainer.train()
        assert said in ended.value.code


def test_the_probe_fails_before_the_first_step(small_model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "advise", lambda *args, **kwargs: "lower it")
    trainer = grpo_trainer(small_model, questions, tmp_path)
    trainer.add_callback(ProbeFirst(trainer))
    fail_in(trainer, at=2)  # with the gradients of the first
    with pytest.raises(SystemExit) as ended, explain_out_of_memory(trainer):
        trainer.train()
    assert "out of memory before step 1, in the largest micro-batch" in ended.value.code
    assert "--probe_memory false" in ended.value.code and "the longest prompt 160 tokens" in ended.value.code
    assert trainer.state.global_step == 0


def test_other_errors_come_through(small_model, questions, tmp_path):
    trainer = sft_trainer(small_model, questions, tmp_path)
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(trainer):
        raise RuntimeError("another")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["", "ds_zero2", "ds_zero3"])
def test_two_processes_probe_together(preloaded, small_model, questions, tmp_path, engine):
    skip_without_compiler(engine)
    (tmp_path / "rewards.py").write_text(
        "def vowels(completions, **kwargs):\n    return [sum(a in 'aeiou' for a in text) / 9 for text in completions]\n"
    )
    logged = []
    for probed in ("false", "true"):
        out = tmp_path / probed
        done = run(
            "sh", "run_grpo.sh", "--use_cpu", "true", "--max_steps", "2", "--save_strategy", "no", "--learning_rate", "1e-2",
            "--questions_per_step", "4", "--num_generations", "4", "--max_completion_length", "8", "--probe_memory", probed,
            "--reward_funcs", f"{tmp_path}/rewards.py:vowels", MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=out,
            GPU_NUM=2, CONFIG=f"conf/{engine}.json" if engine else "", PRELOADED=preloaded,
        )  # fmt: skip
        assert ("memory probed with a pass over 1 question(s) x 4" in done.stdout) == (probed == "true")
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        logged.append(
            [{key: line[key] for key in ("loss", "grad_norm", "kl", "entropy")} for line in lines if "kl" in line]
        )
    assert logged[0] == logged[1] and len(logged[0]) == 2 and logged[0][1]["grad_norm"] > 0
