"""Accuracy during training is what `test_mmau.py` finds on the saved checkpoint; adapters are evaluated as they are."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration, TrainerCallback
from trl import GRPOConfig

import evaluation.answers
import test_mmau
from conftest import QUESTION, write_tone
from dataset.dataset import load_train_dataset
from dataset.questions import load_questions
from running import run
from test_grpo_trainer import length_reward
from train import RecipeConfig
from train_sft import SFTRecipeConfig
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.resume import STATE, check_resumable, checkpoints_in, find_newest, step_of
from trainer.sft_trainer import AudioSFTTrainer
from utils.show_acc import read_results


@pytest.fixture(scope="module")
def asked(questions):
    """The eight training questions in MMAU's format: what is learned by heart is answered right."""
    records = [
        {
            "id": f"q{i}", "audio_id": f"{i}.wav", "question": "What is in the audio?", "choices": QUESTION["multi_choice"],
            "answer": QUESTION["multi_choice"][i % 3], "task": ["sound", "music"][i % 2], "split": "test-mini",
            "difficulty": "easy", "sub-category": "any",
        }
        for i in range(8)
    ]  # fmt: skip
    path = questions.parent / "asked.json"
    path.write_text(json.dumps(records))
    return path


def accuracies(folder, asked, steps) -> dict[str, tuple]:
    """Checkpoint -> (total, sound, music) by test_mmau.py."""
    folders = [str(folder / f"checkpoint-{step}") for step in steps]
    test_mmau.run(test_mmau.parse_args(["--data_file", str(asked), "--model_path", *folders, "--batch_size", "3"]))
    found = {}
    for result in read_results(folder)[0]:
        share = {task: 100 * right / count for task, (right, count) in result.tasks.items()}
        found[int(result.label)] = (result.scores.accuracy, share["sound"], share["music"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_training_logs_what_the_checkpoint_scores(preloaded, small_model, questions, asked, tmp_path, adapters):
    run(
        "sh", "run_sft.sh", "--use_cpu", "true", "--max_steps", "12", "--save_steps", "4", "--questions_per_step", "8",
        "--per_device_train_batch_size", "8", "--learning_rate", "1e-2" if adapters else "1e-3", "--use_peft", adapters,
        "--lr_scheduler_type", "constant", "--eval_file", asked, "--load_best_model_at_end", "true",
        MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=tmp_path, PRELOADED=preloaded, GPU_NUM=1,
    )  # fmt: skip
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    logged = {
        entry["step"]: (entry["eval_accuracy"], entry["eval_accuracy_sound"], entry["eval_accuracy_music"])
        for entry in state["log_history"]
        if "eval_accuracy" in entry
    }
    assert set(logged) == {4, 8, 12}
    for step, scores in accuracies(tmp_path, asked, (4, 8, 12)).items():
        assert logged[step] == pytest.approx(scores)
    assert max(total for total, *_ in logged.values()) > 0, "nothing was learned, so nothing was compared"
    best = tmp_path / state["best_model_checkpoint"].rsplit("/", 1)[-1]
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    best_weights, kept = load_file(best / name), load_file(tmp_path / name)
    assert all(torch.equal(best_weights[key], kept[key]) for key in best_weights)


@pytest.mark.slow
def test_grpo_evaluates_on_two_processes(preloaded, small_model, questions, asked, tmp_path):
    done = run(
        "sh", "run_grpo.sh", "--use_cpu", "true", "--max_steps", "2", "--save_steps", "2", "--questions_per_step", "2",
        "--num_generations", "2", "--max_completion_length", "6", "--eval_file", asked, "--per_device_eval_batch_size", "2",
        MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=tmp_path, PRELOADED=preloaded, GPU_NUM=2,
    )  # fmt: skip
    assert re.search(r"^2/2  evaluated: accuracy [\d.]+  accuracy_sound [\d.]+", done.stdout, re.MULTILINE), done.stdout


@pytest.fixture
def apart(tmp_path) -> Path:
    """Four questions kept apart, with clips of their own that a test may remove."""
    records = [
        {
            "id": f"q{i}", "audio_id": f"{i}.wav", "question": "What is in the audio?", "choices": ["dog", "cat"],
            "answer": "dog", "task": "sound", "split": "test-mini", "difficulty": "easy", "sub-category": "any",
        }
        for i in range(4)
    ]  # fmt: skip
    for i in range(4):
        write_tone(tmp_path / f"{i}.wav", 1.0, frequency=300 * (i + 1))
    (tmp_path / "apart.json").write_text(json.dumps(records))
    return tmp_path / "apart.json"


def make_grpo(model, data, out, asked, **settings) -> AudioGRPOTrainer:
    args = RecipeConfig(
        str(out), use_cpu=True, questions_per_step=2, num_generations=2, max_completion_length=2, max_steps=3, save_steps=1,
        report_to="none", disable_tqdm=True, eval_file=str(asked), per_device_eval_batch_size=2, keep_optimizer="all",
        learning_rate=1e-2, **settings,
    )  # fmt: skip
    return AudioGRPOTrainer(
        str(model), [length_reward], args, load_train_dataset(data), eval_questions=load_questions(asked)
    )


def make_sft(model, data, out, asked, **settings) -> AudioSFTTrainer:
    args = SFTRecipeConfig(
        str(out), use_cpu=True, questions_per_step=2, max_steps=3, save_steps=1, report_to="none", disable_tqdm=True,
        eval_file=str(asked), keep_optimizer="all", learning_rate=1e-2, **settings,
    )  # fmt: skip
    loaded = Qwen2AudioForConditionalGeneration.from_pretrained(model)
    return AudioSFTTrainer(
        loaded, args, load_train_dataset(data, "choice"), AutoProcessor.from_pretrained(model),
        eval_questions=load_questions(asked),
    )  # fmt: skip


class RemoveClip(TrainerCallback):
    """Remove a clip of the evaluation file when a step begins."""

    def __init__(self, clip: Path, step: int):
        self.clip, self.step = clip, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.clip.unlink()


def logged(trainer, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def scored(accuracy: float) -> SimpleNamespace:
    """What an evaluation finds, as far as the trainers look at it."""
    return SimpleNamespace(accuracy=accuracy, groups={"Task": {}})


@pytest.mark.parametrize("make", [make_grpo, make_sft])
def test_a_clip_that_breaks_in_training_costs_its_question_alone(small_model, questions, apart, tmp_path, caplog, make):
    trainer = make(small_model, questions, tmp_path / "out", apart)
    trainer.add_callback(RemoveClip(apart.parent / "1.wav", 1))
    trainer.train()
    assert [step_of(path) for path in checkpoints_in(tmp_path / "out")] == [1, 2, 3]
    assert set(logged(trainer, "eval_accuracy")) == {1, 2, 3}
    assert logged(trainer, "eval_left_out") == {2: 1, 3: 1}
    assert caplog.text.count("1 questions of --eval_file are left out") == caplog.text.count("q1: ") == 1


def test_a_clip_that_breaks_between_decoding_and_asking_is_left_out_too(
    small_model, questions, apart, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation.answers, "KEPT_SAMPLES", 0)  # as for a file of many hours of audio
    trainer = make_grpo(small_model, questions, tmp_path / "out", apart)
    batches = evaluation.answers.EncodedQuestions.batches

    def remove(self):
        (apart.parent / "2.wav").unlink(missing_ok=True)
        return batches(self)

    monkeypatch.setattr(evaluation.answers.EncodedQuestions, "batches", remove)
    assert trainer.evaluate()["eval_left_out"] == 1
    for clip in apart.parent.glob("*.wav"):
        clip.unlink()
    metrics = trainer.evaluate()
    assert metrics["eval_left_out"] == 4 and math.isnan(metrics["eval_accuracy"]), "nothing is left to ask"


@pytest.mark.parametrize("make", [make_grpo, make_sft])
def test_a_steps_checkpoint_is_whole_before_its_evaluation(small_model, questions, apart, tmp_path, monkeypatch, make):
    trainer = make(small_model, questions, tmp_path / "out", apart)
    usual, there = trainer.evaluate, []

    def evaluate(**kwargs):
        there.append(step_of(find_newest(tmp_path / "out")))
        if len(there) == 2:
            raise MemoryError
        return usual(**kwargs)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    with pytest.raises(MemoryError):
        trainer.train()
    assert there == [1, 2]
    state = json.loads((tmp_path / "out" / "checkpoint-1" / STATE).read_text())
    assert state["log_history"] == trainer.state.log_history[: len(state["log_history"])]
    assert "eval_accuracy" in state["log_history"][-1] and state["best_metric"] is not None, (
        "as of after the evaluation"
    )
    check_resumable(tmp_path / "out" / "checkpoint-1")


def test_an_evaluation_leaves_the_random_state_as_it_is(small_model, questions, apart, tmp_path):
    """That of the checkpoint, saved before, is the one with which the run goes on."""
    trainer = make_grpo(small_model, questions, tmp_path / "out", apart)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trainer.evaluate()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.slow
def test_a_run_resumed_from_before_an_evaluation_is_bitwise_the_same(small_model, questions, apart, tmp_path):
    whole = make_grpo(small_model, questions, tmp_path / "whole", apart)
    whole.train()
    resumed = make_grpo(small_model, questions, tmp_path / "resumed", apart)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, expected), found in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found), name
    assert logged(resumed, "eval_accuracy") == logged(whole, "eval_accuracy")


def test_the_best_checkpoint_is_the_one_that_was_evaluated_best(small_model, questions, apart, tmp_path, monkeypatch):
    trainer = make_sft(small_model, questions, tmp_path / "out", apart, save_total_limit=2, load_best_model_at_end=True)
    scores = iter((10.0, 30.0, 20.0))
    monkeypatch.setattr(trainer, "_score_eval_questions", lambda: scored(next(scores)))
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")
    assert [path.name for path in checkpoints_in(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    for path in checkpoints_in(tmp_path / "out"):
        assert json.loads((path / STATE).read_text())["best_global_step"] == 2


def test_a_schedule_by_results_is_saved_after_the_evaluation(small_model, questions, apart, tmp_path, monkeypatch):
    settings = dict(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0, "mode": "max"})
    trainer = make_sft(small_model, questions, tmp_path / "out", apart, **settings)
    scores = iter((30.0, 20.0, 10.0))
    monkeypatch.setattr(trainer, "_score_eval_questions", lambda: scored(next(scores)))
    trainer.train()
    saved = torch.load(tmp_path / "out" / "checkpoint-3" / "scheduler.pt", weights_only=True)
    assert saved["last_epoch"] == 3 and saved["_last_lr"] == pytest.approx([1e-4, 1e-4])


def test_rows_of_no_one_style_are_evaluated_in_the_default_one(small_model, questions, asked, tmp_path):
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=8, max_completion_length=2, bf16=False, use_cpu=True)
    data = load_train_dataset(questions).remove_columns("style")
    trainer = AudioGRPOTrainer(str(small_model), [length_reward], args, data, eval_questions=load_questions(asked))
    assert trainer.prompt_style is None
    assert {"eval_accuracy", "eval_accuracy_sound", "eval_accuracy_music"} <= set(trainer.evaluate())


def test_avqas_rows_are_questions_too(questions):
    benchmark = load_questions(questions)
    assert len(benchmark.questions) == 8 and benchmark.has_answers
    first = benchmark.questions[0]
    assert first.record["question"] == "What is in the audio?" and first.record["answer"] == "dog"
    assert first.audio_path.endswith("0.wav")
