"""Accuracy during training is what `test_mmau.py` finds on the saved checkpoint; adapters are evaluated as they are."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from trl import GRPOConfig

import test_mmau
from conftest import QUESTION
from dataset.dataset import load_train_dataset
from dataset.questions import load_questions
from running import free_port, run
from test_grpo_trainer import length_reward
from trainer.grpo_trainer import AudioGRPOTrainer
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
def test_training_logs_what_the_checkpoint_scores(small_model, questions, asked, tmp_path, adapters):
    run(
        "sh", "run_sft.sh", "--use_cpu", "true", "--max_steps", "12", "--save_steps", "4", "--questions_per_step", "8",
        "--per_device_train_batch_size", "8", "--learning_rate", "1e-2" if adapters else "1e-3", "--use_peft", adapters,
        "--lr_scheduler_type", "constant", "--eval_file", asked, "--load_best_model_at_end", "true",
        MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=tmp_path, MASTER_PORT=free_port(), GPU_NUM=1,
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
def test_grpo_evaluates_on_two_processes(small_model, questions, asked, tmp_path):
    done = run(
        "sh", "run_grpo.sh", "--use_cpu", "true", "--max_steps", "2", "--save_steps", "2", "--questions_per_step", "2",
        "--num_generations", "2", "--max_completion_length", "6", "--eval_file", asked, "--per_device_eval_batch_size", "2",
        MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=tmp_path, MASTER_PORT=free_port(), GPU_NUM=2,
    )  # fmt: skip
    assert re.search(r"^2/2  evaluated: accuracy [\d.]+  accuracy_sound [\d.]+", done.stdout, re.MULTILINE), done.stdout


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
