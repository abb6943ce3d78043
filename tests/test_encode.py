"""What the processor makes of a clip, on the frames that hold audio, and which prompts are refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import row_by_row
from conftest import write_tone
from dataset.audio import load_audio
from dataset.dataset import load_train_dataset
from dataset.encode import (
    check_clip_length,
    count_audio_tokens,
    count_tokens_of_frames,
    encode,
    load_and_encode,
    needed_frames,
)
from dataset.rows import DataError
from evaluation.lengths import check_prompt, count_text_tokens
from model.qwen2_audio import load_processor

CASES = json.loads((Path(__file__).parent / "fixtures" / "audio_tokens.json").read_text())["cases"]
WINDOW = 480_000  # samples: the real model's 30 s, which the original cut longer clips to


@pytest.mark.parametrize(("samples", "frames", "tokens"), CASES)
def test_token_counts_equal_the_originals(samples, frames, tokens):
    assert count_audio_tokens(min(samples, WINDOW)) == tokens


def test_counts_and_features_equal_the_real_processors(shared):
    processor = load_processor(shared / "models" / "qwen2-audio-7b-no-weights")
    rng = np.random.default_rng(0)
    audio_token = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    for samples, frames, tokens in CASES:
        if not 1600 <= samples <= WINDOW:
            continue
        clip = rng.normal(size=samples).astype(np.float32)
        batch, whole = (way(processor, ["What?"], [clip]) for way in (encode, row_by_row.encode))
        assert batch.frames == [frames] and whole["feature_attention_mask"].sum() == frames
        assert (batch.input_ids == audio_token).sum() == tokens
        assert torch.equal(batch.input_ids, whole["input_ids"])
        kept = min(frames + 2, batch.input_features.shape[2])
        assert torch.equal(batch.input_features[..., :kept], whole["input_features"][..., :kept])


def test_shapes_and_left_padding(small_model):
    clips = [np.zeros(8_000, np.float32), np.zeros(16_000, np.float32)]
    batch = encode(load_processor(small_model), ["What?", "What is in the audio?"], clips)
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert batch.attention_mask[0, 0] == 0 and (batch.attention_mask[:, -1] == 1).all()
    assert batch.frames == [50, 100] == batch.audio_inputs["frames"]
    assert batch.input_features.shape[:2] == (2, 64)
    assert needed_frames(100, 200) == 102 <= batch.input_features.shape[2] <= 104, "not the whole window of 200"


def test_clips_outside_the_window_are_refused(small_model):
    processor = load_processor(small_model)
    check_clip_length(32_000, processor)
    check_clip_length(1_600, processor)
    for samples, reason in ((32_001, "clip too long"), (1_599, "clip too short"), (1, "clip too short")):
        with pytest.raises(DataError) as found:
            encode(processor, ["What?"], [np.zeros(samples, np.float32)])
        assert found.value.reason == reason


@pytest.mark.parametrize("token", ["<|im_end|>", "<|AUDIO|>"])
def test_a_special_token_in_the_text_is_refused(small_model, token):
    with pytest.raises(ValueError, match=re.escape(token)):
        encode(load_processor(small_model), [f"What? {token}"], [np.zeros(16_000, np.float32)])


def test_the_checked_length_is_the_length_that_is_trained_on(small_model, questions):
    processor = load_processor(small_model)
    for row in load_train_dataset(questions):
        clip = load_audio(row["audio_path"])
        length = encode(processor, [row["prompt"]], [clip]).input_ids.shape[1]
        checked = (row["prompt"], len(clip), *count_text_tokens(processor, [row["prompt"]]), processor)
        assert check_prompt(*checked, length) == length
        with pytest.raises(ValueError, match=f"{length}.*max_prompt_length"):
            check_prompt(*checked, length - 1)


def test_rows_are_loaded_and_encoded_together(small_model, questions):
    """`take` drops padding that only the other questions need; `encoded_as` keeps everything but the clips."""
    processor, rows = load_processor(small_model), list(load_train_dataset(questions))[:3]
    batch = load_and_encode(processor, rows, "first")
    for wave, row in zip(batch.waves, rows, strict=True):
        assert np.array_equal(wave, load_audio(row["audio_path"]))
    alone = load_and_encode(processor, rows[:1], "first")
    taken = batch.take([0])
    assert torch.equal(taken.input_ids, alone.input_ids) and torch.equal(taken.attention_mask, alone.attention_mask)
    needed = taken.input_features.shape[2]
    assert needed <= alone.input_features.shape[2] < batch.input_features.shape[2] and taken.frames == alone.frames
    assert torch.equal(taken.input_features, alone.input_features[..., :needed])
    assert np.array_equal(taken.waves[0], alone.waves[0]) and len(taken) == 1

    longest = count_tokens_of_frames(max(batch.frames))
    encoded = batch.encoded_as(torch.arange(3 * longest).view(3, 1, longest))
    assert set(batch.audio_inputs) == {"input_features", "frames"}
    assert set(encoded.audio_inputs) == {"encoded_clips", "frames"} and torch.equal(encoded.input_ids, batch.input_ids)
    taken = encoded.take([0]).to(torch.device("cpu"))
    assert taken.encoded and taken.frames == batch.frames[:1] and len(taken.waves) == 1
    assert taken.input_features.flatten().tolist() == list(range(count_tokens_of_frames(batch.frames[0])))


@pytest.mark.parametrize("seconds", [0, 0.05, 2.1])
def test_an_unusable_clip_raises(small_model, questions, tmp_path, seconds):
    row = load_train_dataset(questions)[0] | {"audio_path": str(tmp_path / "bad.wav")}
    if seconds:
        write_tone(tmp_path / "bad.wav", seconds)
    with pytest.raises(DataError):
        load_and_encode(load_processor(small_model), [row], "first")
