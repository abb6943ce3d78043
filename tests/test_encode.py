"""What the processor makes of a clip, and which prompts are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import QUESTION, write_tone
from transformers import AutoProcessor

from dataset.dataset import load_train_dataset
from dataset.encode import check_clip_length, check_prompts, count_audio_tokens, encode

CASES = json.loads((Path(__file__).parent / "fixtures" / "audio_tokens.json").read_text())["cases"]
WINDOW = 480_000  # samples: the real model's 30 s, which the original cut longer clips to


@pytest.mark.parametrize(("samples", "frames", "tokens"), CASES)
def test_token_counts_equal_the_originals(samples, frames, tokens):
    assert count_audio_tokens(min(samples, WINDOW)) == tokens


def test_counts_equal_the_real_processors(shared):
    processor = AutoProcessor.from_pretrained(shared / "models" / "qwen2-audio-7b-no-weights")
    rng = np.random.default_rng(0)
    audio_token = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    for samples, frames, tokens in CASES:
        if not 1600 <= samples <= WINDOW:
            continue
        encoded = encode(processor, ["What?"], [rng.normal(size=samples).astype(np.float32)])
        assert encoded["feature_attention_mask"].sum() == frames
        assert (encoded["input_ids"] == audio_token).sum() == tokens
        assert encoded["input_features"].shape == (1, 128, 3000)


def test_shapes_and_left_padding(small_model):
    processor = AutoProcessor.from_pretrained(small_model)
    clips = [np.zeros(8_000, np.float32), np.zeros(32_000, np.float32)]
    encoded = encode(processor, ["What?", "What is in the audio?"], clips)
    assert encoded["input_ids"].shape == encoded["attention_mask"].shape
    assert encoded["attention_mask"][0, 0] == 0 and (encoded["attention_mask"][:, -1] == 1).all()
    assert encoded["input_features"].shape == (2, 64, 200)
    assert encoded["feature_attention_mask"].sum(1).tolist() == [50, 200]


def test_clips_outside_the_window_are_refused(small_model):
    processor = AutoProcessor.from_pretrained(small_model)
    check_clip_length(32_000, processor)
    check_clip_length(1_600, processor)
    for samples, message in ((32_001, "hears 2 s"), (1_599, "under the 0.1 s"), (1, "under")):
        with pytest.raises(ValueError, match=message):
            encode(processor, ["What?"], [np.zeros(samples, np.float32)])


def test_the_checked_length_is_the_length_that_is_trained_on(small_model, questions):
    processor = AutoProcessor.from_pretrained(small_model)
    dataset = load_train_dataset(questions)
    from dataset.audio import load_audio

    lengths = [
        encode(processor, [row["prompt"]], [load_audio(row["audio_path"])])["input_ids"].shape[1] for row in dataset
    ]
    check_prompts(dataset, processor, max(lengths))
    with pytest.raises(ValueError, match=f"the prompt has {max(lengths)} tokens, over max_prompt_length"):
        check_prompts(dataset, processor, max(lengths) - 1)


def test_a_long_list_of_problems_is_cut(small_model, tmp_path):
    write_tone(tmp_path / "long.wav", 3.0)
    row = json.dumps(QUESTION | {"answer": 0, "audio_path": "long.wav"}) + "\n"
    (tmp_path / "train.jsonl").write_text(row * 25)
    with pytest.raises(ValueError) as error:
        check_prompts(load_train_dataset(tmp_path / "train.jsonl"), AutoProcessor.from_pretrained(small_model), 1024)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("25 of 25 rows") and lines[-1].strip() == "... and 15 more" and len(lines) == 12
