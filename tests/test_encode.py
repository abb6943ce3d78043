"""What the processor makes of a clip, on the frames that hold audio, and which prompts are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import row_by_row
from dataset.audio import load_audio
from dataset.dataset import load_train_dataset
from dataset.encode import (
    MAX_REPLACEMENTS,
    check_clip_length,
    check_prompt,
    count_audio_tokens,
    count_text_tokens,
    encode,
    load_or_replace,
    needed_frames,
)
from dataset.rows import DataError
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
    for samples, message in ((32_001, "hears 2 s"), (1_599, "under the 0.1 s"), (1, "under")):
        with pytest.raises(ValueError, match=message):
            encode(processor, ["What?"], [np.zeros(samples, np.float32)])


@pytest.mark.parametrize("token", ["<|im_end|>", "<|AUDIO|>"])
def test_a_special_token_in_the_text_is_refused(small_model, token):
    with pytest.raises(ValueError, match="What.*special token .*reword it"):
        encode(load_processor(small_model), [f"What? {token}"], [np.zeros(16_000, np.float32)])


def test_the_checked_length_is_the_length_that_is_trained_on(small_model, questions):
    processor = load_processor(small_model)
    for row in load_train_dataset(questions):
        clip = load_audio(row["audio_path"])
        length = encode(processor, [row["prompt"]], [clip]).input_ids.shape[1]
        checked = (row["prompt"], len(clip), *count_text_tokens(processor, [row["prompt"]]), processor)
        assert check_prompt(*checked, length) == length
        with pytest.raises(ValueError, match=f"the prompt has {length} tokens, over max_prompt_length"):
            check_prompt(*checked, length - 1)


@pytest.mark.parametrize("damage", ["gone", "silent", "too long"])
def test_a_question_whose_clip_cannot_be_used_is_replaced(small_model, questions, tmp_path, caplog, damage):
    processor, dataset = load_processor(small_model), load_train_dataset(questions)
    if damage != "gone":
        samples = np.zeros(16_000) if damage == "silent" else np.full(32_001, 0.1)
        soundfile.write(tmp_path / "bad.wav", samples, 16_000)
    bad = dataset[0] | {"audio_path": str(tmp_path / "bad.wav")}
    with pytest.raises((ValueError, OSError)):
        load_or_replace(bad, "first", processor)
    row, clip, replaced = load_or_replace(bad, "first", processor, dataset)
    assert row in list(dataset) and np.array_equal(clip, load_audio(row["audio_path"])) and replaced == 1
    assert len(caplog.messages) == 1 and "replaced by another" in caplog.messages[0]
    row, _, replaced = load_or_replace(row, "first", processor, dataset)
    assert replaced == 0 and len(caplog.messages) == 1


def test_replacing_ends_where_no_clip_can_be_read(small_model, questions, tmp_path, caplog):
    processor, dataset = load_processor(small_model), load_train_dataset(questions)
    gone = dataset.map(lambda row: row | {"audio_path": str(tmp_path / "gone.wav")})
    with pytest.raises(DataError, match="11 clips in a row.*gone.wav"):
        load_or_replace(gone[0], "first", processor, gone)
    assert len(caplog.messages) == MAX_REPLACEMENTS
