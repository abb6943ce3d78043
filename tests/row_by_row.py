"""The slow, obvious way that the shared prompt must equal: every completion in a row of its own, prompt and audio
repeated G times through encoder and language model, logits of every position. No TRL, nothing of ours.

Shapes: N questions, G generations, P prompt, C completion, M mel bins, F mel frames.
"""

import torch


def repeat_rows(prompts: dict[str, torch.Tensor], generations: int) -> dict[str, torch.Tensor]:
    """Each of N questions' tensors G times in a row: (N, ...) -> (N * G, ...)."""
    return {key: value.repeat_interleave(generations, dim=0) for key, value in prompts.items()}


def log_probs(model, prompts: dict, completion_ids: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """(N, G, C) log-probs, zero at padding.

    Args:
        prompts: `input_ids`, `attention_mask` (N, P), left-padded; `input_features` (N, M, F),
            `feature_attention_mask` (N, F).
        completion_ids: (N, G, C), right-padded; completion_mask likewise, 0 at padding.
    """
    questions, generations, length = completion_ids.shape
    rows = repeat_rows(prompts, generations)
    completions, mask = completion_ids.flatten(0, 1), completion_mask.flatten(0, 1)
    rows["input_ids"] = torch.cat([rows["input_ids"], completions], dim=1)
    rows["attention_mask"] = torch.cat([rows["attention_mask"], mask], dim=1)
    rows["position_ids"] = (rows["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits = model(**rows).logits[:, -length - 1 : -1]  # (N * G, C, vocabulary)
    chosen = logits.log_softmax(dim=-1).gather(2, completions[..., None]).squeeze(2)
    return (chosen * mask).view(questions, generations, length)


def generate(model, prompts: dict, generations: int, **generation) -> torch.Tensor:
    """(N * G, C) completions by plain `generate` on repeated rows."""
    with torch.no_grad():
        sequences = model.generate(**repeat_rows(prompts, generations), **generation)
    return sequences[:, prompts["input_ids"].shape[1] :]
