"""Supervised fine-tuning: only the answer is learned, by all weights and by adapters."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

import row_by_row
from baselines.sft_trainer import AudioSFTTrainer
from conftest import QUESTION, write_rows, write_tone
from dataset.dataset import load_train_dataset
from dataset.prompt import load_style
from dataset.rows import DataError
from model.qwen2_audio import load_processor
from run.clips import replace_broken_clips
from running import run
from train_sft import SFTRecipeConfig


@pytest.fixture(scope="module")
def processor(small_model):
    return load_processor(small_model)


@pytest.mark.parametrize(
    ("style", "learned"),
    [
        ("choice", ["dog<|im_end|>", "bell<|im_end|>"]),
        ("answer", [f"<answer>{a}</answer><|im_end|>" for a in ("dog", "bell")]),
    ],
)
def test_exactly_the_answer_is_learned(small_model, processor, tmp_path, style, learned):
    rows = []
    for answer, seconds in ((0, 0.6), (2, 1.5)):
        write_tone(tmp_path / f"{answer}.wav", seconds)
        rows.append(QUESTION | {"answer": answer, "audio_path": f"{answer}.wav"})
    write_rows(tmp_path, *rows)
    dataset = load_train_dataset(tmp_path / "train.jsonl", style)
    batch = make_trainer(small_model, tmp_path / "train.jsonl", tmp_path, style).collate(list(dataset))
    for ids, labels, mask, row, text in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], dataset, learned, strict=True
    ):
        assert processor.tokenizer.decode(ids[labels != -100]) == text
        read = processor.tokenizer.decode(ids[(labels == -100) & (mask == 1)])
        assert read.replace("<|AUDIO|>", "").endswith(row["prompt"] + "<|im_end|>\n<|im_start|>assistant\n")
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        first = int((labels != -100).nonzero()[0])
        assert (labels[:first] == -100).all() and (labels[mask == 0] == -100).all()
    assert batch["position_ids"][0][batch["attention_mask"][0] == 1].tolist() == list(
        range(int(batch["attention_mask"][0].sum()))
    )


def make_trainer(model, data, output_dir, style="choice", freeze=(), **settings) -> AudioSFTTrainer:
    defaults = dict(max_steps=1, save_strategy="no", lr_scheduler_type="constant")
    args = SFTRecipeConfig(
        str(output_dir),
        use_cpu=True,
        report_to="none",
        learning_rate=1e-3,
        **defaults | settings,
    )
    return AudioSFTTrainer(
        Qwen2AudioForConditionalGeneration.from_pretrained(model),
        args,
        load_train_dataset(data, style),
        load_processor(model),
        freeze=freeze,
    )


def test_the_question_of_a_broken_clip_is_replaced(small_model, tmp_path):
    write_tone(tmp_path / "0.wav", 1.0)
    rows = [QUESTION | {"answer": 0, "audio_path": f"{i}.wav"} for i in range(2)]
    write_rows(tmp_path, *rows)
    trainer = make_trainer(small_model, tmp_path / "train.jsonl", tmp_path / "out", questions_per_step=2)
    with pytest.raises(DataError):
        trainer.train()
    replace_broken_clips(trainer)
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_loss_is_the_answers_cross_entropy(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path)
    batch = trainer.collate(list(trainer.train_dataset.select(range(3))))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    labels = batch.pop("labels")
    batch |= row_by_row.with_mask(batch["input_features"], batch.pop("frames"))
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    logits = model(**batch | row_by_row.whole_windows(model, batch)).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


def test_accumulated_and_single_batches_take_the_same_step(small_model, questions, tmp_path):
    """Answers differ in length: a mean over micro-batches' means would not be the mean over tokens."""
    weights = []
    for size in (1, 4):
        trainer = make_trainer(small_model, questions, tmp_path, questions_per_step=4, per_device_train_batch_size=size)
        assert trainer.args.gradient_accumulation_steps == 4 // size
        trainer.train()
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters()})
        norm = trainer.state.log_history[0]["grad_norm"]
        weights[-1]["norm"] = torch.tensor(norm)
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=2e-5, rtol=1e-4, msg=name)


def test_a_resumed_run_continues_the_interrupted_one(small_model, questions, tmp_path):
    settings = dict(max_steps=3, save_strategy="steps", save_steps=2, keep_optimizer="all", questions_per_step=2)
    whole = make_trainer(small_model, questions, tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(small_model, questions, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, expected), found in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_frozen_parts_stay(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, freeze=("audio_encoder",), questions_per_step=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("audio_tower" in name), name


def test_thoughts_cannot_be_learned(small_model, questions, tmp_path):
    with pytest.raises(ValueError, match="think"):
        make_trainer(small_model, questions, tmp_path, style="think")


@pytest.mark.slow
def test_the_launcher_learns_the_answers(small_model, questions, tmp_path):
    done = run(
        "sh", "run_sft.sh", "--use_cpu", "true", "--max_steps", "30", "--save_steps", "30", "--questions_per_step", "8",
        "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--logging_steps", "10",
        MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=tmp_path, GPU_NUM=1,
    )  # fmt: skip
    folder = tmp_path / "checkpoint-30"
    assert load_style(folder) == "choice"
    losses = [step["loss"] for step in json.loads((folder / "trainer_state.json").read_text())["log_history"]]
    assert losses[-1] < 0.8 * losses[0], done.stdout
    assert set(load_file(folder / "model.safetensors")) == set(load_file(small_model / "model.safetensors"))
    AutoProcessor.from_pretrained(folder)
