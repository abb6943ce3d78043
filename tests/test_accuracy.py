"""Accuracy during training is what `test_mmau.py` finds on the saved checkpoint."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration, TrainerCallback

import test_mmau
from baselines.sft_trainer import AudioSFTTrainer
from conftest import QUESTION, write_tone
from dataset.dataset import load_train_dataset
from dataset.questions import load_questions
from evaluation.collect import read_results
from model.qwen2_audio import load_processor
from run import attach
from run.arguments import LINEAR_LAYERS
from run.checkpoints import checkpoints_in, read_settings
from run.curves import PlotCurves
from runs import length_reward
from train import RecipeConfig
from train_sft import SFTRecipeConfig
from trainer.grpo_trainer import AudioGRPOTrainer


def write_benchmark(path: Path, count: int, **row) -> Path:
    records = [
        {
            "id": f"q{i}", "audio_id": f"{i}.wav", "question": "What is in the audio?", "split": "test-mini",
            "choices": QUESTION["multi_choice"], "answer": QUESTION["multi_choice"][i % 3], "difficulty": "easy",
            "task": ["sound", "music"][i % 2], "sub-category": "any",
        } | row
        for i in range(count)
    ]  # fmt: skip
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def asked(questions) -> Path:
    """The eight training questions in MMAU's format: what is learned by heart is answered right."""
    return write_benchmark(questions.parent / "asked.json", 8)


@pytest.fixture
def apart(tmp_path) -> Path:
    """Four questions with their own clips, which a test may remove."""
    for i in range(4):
        write_tone(tmp_path / f"{i}.wav", 1.0, frequency=300 * (i + 1))
    return write_benchmark(tmp_path / "apart.json", 4, answer="dog", task="sound")


def attached(trainer, benchmark):
    attach(trainer, {}, benchmark)
    trainer.remove_callback(PlotCurves)
    return trainer


def settings(out, file, **given) -> dict:
    usual = dict(
        output_dir=str(out), use_cpu=True, questions_per_step=2, max_steps=3, save_steps=1, report_to="none",
        disable_tqdm=True, eval_file=str(file), keep_optimizer="all", learning_rate=1e-2,
    )  # fmt: skip
    return usual | given


def make_grpo(model, data, out, file, **given) -> AudioGRPOTrainer:
    args = RecipeConfig(**settings(out, file, num_generations=2, max_completion_length=2, **given))
    rows, asked = load_train_dataset(data), load_questions(file)
    return attached(AudioGRPOTrainer(str(model), [length_reward], args, rows, eval_dataset=asked.questions), asked)


def make_sft(model, data, out, file, lora=False, **given) -> AudioSFTTrainer:
    args, asked = SFTRecipeConfig(**settings(out, file, **given)), load_questions(file)
    loaded = Qwen2AudioForConditionalGeneration.from_pretrained(model)
    if lora:
        loaded = get_peft_model(loaded, LoraConfig(r=8, target_modules=list(LINEAR_LAYERS)))
    rows, processor = load_train_dataset(data, "choice"), load_processor(model)
    return attached(AudioSFTTrainer(loaded, args, rows, processor, eval_dataset=asked.questions), asked)


def logged(trainer, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def scores(folder: Path, file: Path) -> dict[int, tuple]:
    """Step -> (total, sound, music) by test_mmau.py."""
    folders = map(str, checkpoints_in(folder))
    test_mmau.run(test_mmau.parse_args(["--data_file", str(file), "--model_path", *folders, "--batch_size", "3"]))
    found = {}
    for result in read_results(folder)[0]:
        tasks = {task: 100 * right / asked for task, (right, asked) in result.counts.items()}
        found[int(result.label)] = result.accuracy, tasks["sound"], tasks["music"]
    return found


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_training_logs_what_the_checkpoint_scores(small_model, questions, asked, tmp_path, lora):
    """And the best checkpoint's weights are kept at the end."""
    trainer = make_sft(
        small_model, questions, tmp_path, asked, lora, max_steps=12, save_steps=4, questions_per_step=8,
        per_device_train_batch_size=8, learning_rate=1e-2 if lora else 1e-3, lr_scheduler_type="constant",
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    total, sound, music = (logged(trainer, f"eval_accuracy{task}") for task in ("", "_sound", "_music"))
    found = scores(tmp_path, asked)
    assert set(found) == set(total) == {4, 8, 12}
    for step, expected in found.items():
        assert (total[step], sound[step], music[step]) == pytest.approx(expected)
    assert max(total.values()) > 0, "nothing was learned, so nothing was compared"
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    best, kept = (load_file(Path(folder) / name) for folder in (trainer.state.best_model_checkpoint, tmp_path))
    assert best.keys() == kept.keys() and all(torch.equal(best[key], kept[key]) for key in best)


class RemoveClip(TrainerCallback):
    """Removes a clip when a step begins."""

    def __init__(self, clip: Path, step: int):
        self.clip, self.step = clip, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.clip.unlink()


@pytest.mark.parametrize("make", [make_grpo, make_sft])
def test_a_clip_that_breaks_in_training_omits_its_question(small_model, questions, apart, tmp_path, make):
    trainer = make(small_model, questions, tmp_path / "out", apart)
    trainer.add_callback(RemoveClip(apart.parent / "1.wav", 1))
    trainer.train()
    assert len(checkpoints_in(tmp_path / "out")) == 3 and set(logged(trainer, "eval_accuracy")) == {1, 2, 3}
    assert logged(trainer, "eval_left_out") == {2: 1, 3: 1}


def test_no_usable_clip_gives_no_accuracy(small_model, questions, apart, tmp_path):
    trainer = make_grpo(small_model, questions, tmp_path / "out", apart)
    for clip in apart.parent.glob("*.wav"):
        clip.unlink()
    metrics = trainer.evaluate()
    assert metrics["eval_left_out"] == 4 and math.isnan(metrics["eval_accuracy"])


@pytest.mark.parametrize("make", [make_grpo, make_sft])
def test_a_checkpoint_is_whole_before_its_evaluation(small_model, questions, apart, tmp_path, make):
    trainer = make(small_model, questions, tmp_path / "out", apart)
    trainer.add_callback(Interrupt(tmp_path / "out", saved := []))
    with pytest.raises(MemoryError):
        trainer.train()
    assert saved == [1, 2]
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert "eval_accuracy" in state["log_history"][-1] and state["best_metric"] is not None


class Interrupt(TrainerCallback):
    """Notes the newest whole checkpoint after each evaluation, and fails after the second."""

    def __init__(self, out: Path, saved: list[int]):
        self.out, self.saved = out, saved

    def on_evaluate(self, args, state, control, **kwargs):
        newest = checkpoints_in(self.out)[-1]
        read_settings(newest)
        self.saved.append(int(newest.name.removeprefix("checkpoint-")))
        if len(self.saved) == 2:
            raise MemoryError


@pytest.mark.slow
def test_a_run_resumed_from_before_an_evaluation_is_bitwise_the_same(small_model, questions, apart, tmp_path):
    whole, resumed = (make_grpo(small_model, questions, tmp_path / name, apart) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, expected), found in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found), name
    assert logged(resumed, "eval_accuracy") == logged(whole, "eval_accuracy")
