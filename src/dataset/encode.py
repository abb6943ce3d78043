"""Questions and clips -> the model's input tensors. What is Qwen2-Audio's own about the input stands here: how many
tokens a clip becomes, how long it may be, and the call of its processor.

Shapes: N questions, P prompt tokens (left-padded), M mel bins, F mel frames (the feature extractor's whole window).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .audio import SAMPLE_RATE, DataError, count_samples
from .prompt import build_messages

if TYPE_CHECKING:  # only named here: importing them takes seconds, which `check.py` without a model need not wait
    from datasets import Dataset
    from transformers import BatchFeature, Qwen2AudioProcessor

# Two audio tokens. A prompt with a single one is taken by transformers 5 for one in old processors' unexpanded format.
MIN_SECONDS = 0.1
WINDOW_SECONDS = 30  # what Qwen2-Audio hears
MAX_PROMPT_LENGTH = 1024  # tokens; 10 s of audio are 250, its question about 60
PROBE = " \n a text \n "  # stands for any text, where only its place is wanted
SHOWN = 10  # problems listed in one message


def count_audio_tokens(samples: int, hop_length: int = 160) -> int:
    """The number of `<|AUDIO|>` tokens of a 16 kHz clip that fits the window: 40 ms each, 10 s are 250.

    >>> count_audio_tokens(160_000)
    250
    """
    frames = -(-samples // hop_length)
    after_convolution = (frames - 1) // 2 + 1
    return (after_convolution - 2) // 2 + 1


def check_clip_length(samples: int, processor: Qwen2AudioProcessor | None) -> None:
    """Raise a `DataError` for a clip that the processor would cut, or that is too short to be heard at all.

    Without a processor, the window is that of Qwen2-Audio.
    """
    window = processor.feature_extractor.n_samples if processor else WINDOW_SECONDS * SAMPLE_RATE
    if samples > window:
        message = f"the clip lasts {samples / SAMPLE_RATE:.2f} s, the model hears {window / SAMPLE_RATE:g} s; "
        raise DataError(message + "cut the clip or remove its row", "clip too long")
    if samples < MIN_SECONDS * SAMPLE_RATE:
        message = f"the clip lasts {samples / SAMPLE_RATE:.3f} s, under the {MIN_SECONDS} s needed; remove its row"
        raise DataError(message, "clip too short")


def build_chat(processor: Qwen2AudioProcessor, text: str) -> str:
    """The whole prompt as text: system turn, user turn with the audio's placeholder and `text`, assistant header."""
    return processor.apply_chat_template(build_messages(text), add_generation_prompt=True, tokenize=False)


def encode(processor: Qwen2AudioProcessor, texts: list[str], clips: list[np.ndarray]) -> BatchFeature:
    """Tokenize N questions with their clips.

    Args:
        processor: its tokenizer must pad on the left.
        texts: N user texts, as `build_question` makes them.
        clips: N float32 arrays of shape (samples,), 16 kHz.

    Returns:
        `input_ids` and `attention_mask` (N, P), `input_features` (N, M, F), `feature_attention_mask` (N, F).

    Raises:
        ValueError: a clip is too long or too short.
    """
    for clip in clips:
        check_clip_length(len(clip), processor)
    chats = [build_chat(processor, text) for text in texts]
    return processor(text=chats, audio=clips, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")


def count_text_tokens(processor: Qwen2AudioProcessor, texts: list[str]) -> list[int]:
    """Tokens of each user text's whole prompt, without those of its clip."""
    before, found, after = build_chat(processor, PROBE).partition(PROBE)
    if found:  # the template puts texts in as they are; filling it in 40,000 times would take longer than the tokens do
        chats = [before + text + after for text in texts]
    else:
        chats = [build_chat(processor, text) for text in texts]
    encoded = processor.tokenizer(chats)["input_ids"]
    return [len(ids) - 1 for ids in encoded]  # the placeholder is the clip's


def check_prompt(
    text: str, samples: int, text_tokens: int, processor: Qwen2AudioProcessor, max_prompt_length: int | None
) -> int:
    """Whether a question can be asked as it is.

    Args:
        text: the user's, as `build_question` makes it.
        samples: of its clip, 16 kHz.
        text_tokens: as `count_text_tokens` has it.
        max_prompt_length: in tokens, the audio's included; None is no limit.

    Returns:
        The prompt's length in tokens.

    Raises:
        DataError: the text holds one of the tokenizer's special tokens, the clip is too long or too short, or the
            prompt is over `max_prompt_length`.
    """
    check_no_special_token(text, processor)
    check_clip_length(samples, processor)
    length = text_tokens + count_audio_tokens(samples, processor.feature_extractor.hop_length)
    if max_prompt_length is not None and length > max_prompt_length:
        message = f"the prompt has {length} tokens, over max_prompt_length {max_prompt_length}; "
        raise DataError(message + "raise --max_prompt_length or remove the row", "prompt too long")
    return length


def check_no_special_token(text: str, processor: Qwen2AudioProcessor) -> None:
    """Raise a `DataError` for a text that holds one of the tokenizer's special tokens."""
    if found := next((token for token in processor.tokenizer.all_special_tokens if token in text), None):
        message = f"the question holds the special token {found}, which the model would obey; reword it"
        raise DataError(message, "special token in the question")


def check_prompts(dataset: Dataset, processor: Qwen2AudioProcessor, max_prompt_length: int) -> None:
    """Refuse, before training, every row whose prompt cannot be used as it is. Reads the clips' headers only.

    Args:
        dataset: with the columns `prompt` and `audio_path`, and `row` where rows have a line number.
        processor: of the model to train.
        max_prompt_length: in tokens, the audio's included.

    Raises:
        ValueError: lists the rows whose clip is missing, unreadable, too long or too short, whose text holds one of the
            tokenizer's special tokens, or whose prompt is over `max_prompt_length`.
    """
    texts = dataset.unique("prompt")
    text_tokens = dict(zip(texts, count_text_tokens(processor, texts), strict=True))
    rows = dataset["row"] if "row" in dataset.column_names else range(1, len(dataset) + 1)
    problems = []
    for row, text, path in zip(rows, dataset["prompt"], dataset["audio_path"], strict=True):
        try:
            check_prompt(text, count_samples(path), text_tokens[text], processor, max_prompt_length)
        except DataError as error:
            problems.append(f"  row {row} ({Path(path).name}): {error}")
    if problems:
        listed = problems[:SHOWN] + ([f"  ... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
        raise ValueError(f"{len(problems)} of {len(dataset)} rows cannot be trained on:\n" + "\n".join(listed))
