"""Questions and clips -> the model's input tensors. What is Qwen2-Audio's own about the input side stands here: how many
tokens a clip becomes, how long it may be, and the call of its processor.

Shapes: N questions, P prompt tokens (left-padded), M mel bins, F mel frames (the feature extractor's whole window).
"""

from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import BatchFeature, Qwen2AudioProcessor

from .audio import SAMPLE_RATE, count_samples
from .prompt import build_messages

# Two audio tokens. A prompt with a single one is taken by transformers 5 for one in old processors' unexpanded format.
MIN_SECONDS = 0.1
SHOWN = 10  # problems listed in one message


def count_audio_tokens(samples: int, hop_length: int = 160) -> int:
    """The number of `<|AUDIO|>` tokens of a 16 kHz clip that fits the window: 40 ms each, 10 s are 250.

    >>> count_audio_tokens(160_000)
    250
    """
    frames = -(-samples // hop_length)
    after_convolution = (frames - 1) // 2 + 1
    return (after_convolution - 2) // 2 + 1


def check_clip_length(samples: int, processor: Qwen2AudioProcessor) -> None:
    """Raise a `ValueError` for a clip that the processor would cut, or that is too short to be heard at all."""
    extractor = processor.feature_extractor
    if samples > extractor.n_samples:
        raise ValueError(
            f"the clip lasts {samples / SAMPLE_RATE:.2f} s, the model hears {extractor.chunk_length} s; "
            "cut the clip or remove its row"
        )
    if samples < MIN_SECONDS * SAMPLE_RATE:
        raise ValueError(f"the clip lasts {samples / SAMPLE_RATE:.3f} s, under the {MIN_SECONDS} s needed; remove its row")


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
    tokenizer = processor.tokenizer
    special_tokens = tokenizer.all_special_tokens
    texts = dataset.unique("prompt")
    encoded = tokenizer([build_chat(processor, text) for text in texts])["input_ids"]
    # Less the audio's placeholder: the clip's own tokens are added below.
    text_length = {text: len(ids) - 1 for text, ids in zip(texts, encoded, strict=True)}
    rows = dataset["row"] if "row" in dataset.column_names else range(1, len(dataset) + 1)
    problems = []
    for row, text, path in zip(rows, dataset["prompt"], dataset["audio_path"], strict=True):
        try:
            _check_prompt(text, path, text_length[text], processor, special_tokens, max_prompt_length)
        except (ValueError, OSError) as error:
            name = Path(path).name
            problems.append(f"  row {row} ({name}): {error}")
    if problems:
        listed = problems[:SHOWN] + ([f"  ... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
        raise ValueError(f"{len(problems)} of {len(dataset)} rows cannot be trained on:\n" + "\n".join(listed))


def _check_prompt(text, path, text_tokens, processor, special_tokens, max_prompt_length) -> None:
    found = [token for token in special_tokens if token in text]
    if found:
        raise ValueError(f"the question holds the special token {found[0]}, which the model would obey; reword it")
    samples = count_samples(path)
    check_clip_length(samples, processor)
    length = text_tokens + count_audio_tokens(samples, processor.feature_extractor.hop_length)
    if length > max_prompt_length:
        raise ValueError(
            f"the prompt has {length} tokens, over max_prompt_length {max_prompt_length}; "
            "raise --max_prompt_length or remove the row"
        )
