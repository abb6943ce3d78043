"""How many tokens prompts have before they are encoded: for the order of batches, and for the data check."""

from typing import Any

from dataset.encode import build_chat, check_clip_length, check_no_special_token, count_audio_tokens
from dataset.rows import DataError

PROBE = " \n a text \n "  # placeholder text, used to find where the template inserts the question


def count_text_tokens(processor: Any, texts: list[str]) -> list[int]:
    """Tokens of each user text's whole prompt, without those of its clip."""
    before, found, after = build_chat(processor, PROBE).partition(PROBE)
    # If the template inserts texts unchanged, it is filled in once: 40,000 times would take longer than tokenizing.
    chats = [before + text + after if found else build_chat(processor, text) for text in texts]
    return [len(ids) - 1 for ids in processor.tokenizer(chats)["input_ids"]]  # without the clip's placeholder


def check_prompt(text: str, samples: int, text_tokens: int, processor: Any, max_prompt_length: int | None) -> int:
    """The length of a prompt in tokens, its clip of `samples` at 16 kHz included; 0 without a processor.

    Raises a `DataError` if `encode` would refuse text or clip, or if the prompt is over `max_prompt_length`.
    `text_tokens` come from `count_text_tokens`.
    """
    check_clip_length(samples, processor)
    if processor is None:
        return 0
    check_no_special_token(text, processor)
    length = text_tokens + count_audio_tokens(samples, processor.feature_extractor.hop_length)
    if max_prompt_length is not None and length > max_prompt_length:
        limit = f"over the limit of {max_prompt_length} (in training --max_prompt_length)"
        raise DataError(f"the prompt has {length} tokens, {limit}; shorten it or remove its row", "prompt too long")
    return length
