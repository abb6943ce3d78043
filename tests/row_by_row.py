"""The slow, obvious way that the shared prompt must equal: every completion in a row of its own, prompt and audio
repeated G times through encoder and language model, the encoder on whole windows, logits of every position. No TRL, nothing of
ours but the prompt's wording.

Shapes: N questions, G generations, P prompt, C completion, M mel bins, F mel frames.
"""

import torch

from dataset.encode import build_chat

AUDIO_INPUTS = ("input_features", "feature_attention_mask")


def encode(processor, texts: list[str], clips: list) -> dict[str, torch.Tensor]:
    """The processor's own way: every clip in a whole window, all questions in one call."""
    chats = [build_chat(processor, text) for text in texts]
    return processor(text=chats, audio=clips, sampling_rate=16_000, padding=True, return_tensors="pt")


def whole_windows(model, prompts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`prompts` with features of the length that the model's own forward insists on; what is added is masked there."""
    missing = 2 * model.config.audio_config.max_source_positions - prompts["input_features"].shape[2]
    audio = {key: torch.nn.functional.pad(prompts[key], (0, missing)) for key in AUDIO_INPUTS}
    return {key: prompts[key] for key in ("input_ids", "attention_mask")} | audio


def with_mask(input_features: torch.Tensor, frames: list[int]) -> dict[str, torch.Tensor]:
    """Clips as the model's own forward takes them: a mask (N, F) says which frames hold audio."""
    places = torch.arange(input_features.shape[2], device=input_features.device)
    mask = places < torch.tensor(frames, device=places.device)[:, None]
    return dict(zip(AUDIO_INPUTS, (input_features, mask.long()), strict=True))


def as_inputs(batch) -> dict[str, torch.Tensor]:
    """A `dataset.encode.Batch` as the model's keyword arguments."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **with_mask(**batch.audio_inputs)}


def repeat_rows(prompts: dict[str, torch.Tensor], generations: int) -> dict[str, torch.Tensor]:
    """Each of N questions' tensors G times in a row: (N, ...) -> (N * G, ...)."""
    return {key: value.repeat_interleave(generations, dim=0) for key, value in prompts.items()}


def log_probs(
    model, prompts: dict, completion_ids: torch.Tensor, completion_mask: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """(N, G, C) log-probs, zero at padding.

    Args:
        prompts: `input_ids`, `attention_mask` (N, P), left-padded; `input_features` (N, M, F) of the whole window or its
            beginning, `feature_attention_mask` (N, F).
        completion_ids: (N, G, C), right-padded; completion_mask likewise, 0 at padding.
        temperature: what the logits are divided by.
    """
    questions, generations, length = completion_ids.shape
    rows = repeat_rows(whole_windows(model, prompts), generations)
    completions, mask = completion_ids.flatten(0, 1), completion_mask.flatten(0, 1)
    rows["input_ids"] = torch.cat([rows["input_ids"], completions], dim=1)
    rows["attention_mask"] = torch.cat([rows["attention_mask"], mask], dim=1)
    rows["position_ids"] = (rows["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits = model(**rows).logits[:, -length - 1 : -1]  # (N * G, C, vocabulary)
    chosen = (logits / temperature).log_softmax(dim=-1).gather(2, completions[..., None]).squeeze(2)
    return (chosen * mask).view(questions, generations, length)


def generate(model, prompts: dict, generations: int, **generation) -> torch.Tensor:
    """(N * G, C) completions by plain `generate` on repeated rows."""
    with torch.no_grad():
        sequences = model.generate(**repeat_rows(whole_windows(model, prompts), generations), **generation)
    return sequences[:, prompts["input_ids"].shape[1] :]
