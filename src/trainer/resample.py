"""Questions whose G rewards are all equal give no gradient; these pure functions find such groups and put others in
their place. Which questions are tried, and when, is the trainer's business.

Dynamic sampling, as in DAPO (arXiv 2503.14476, section 3.2), on batches of whole groups.

Shapes: N questions, G generations, P prompt, C completion, F mel frames; a batch has tensors (N, ...) and (N, G, ...).
"""

import torch

# Ragged tensors and the side that padding is on; the others have the same shape in every batch.
LEFT, RIGHT = 0, 1
PADDED_SIDE = {
    "prompt_ids": LEFT,
    "prompt_mask": LEFT,
    "completion_ids": RIGHT,
    "completion_mask": RIGHT,
    "old_per_token_logps": RIGHT,
    "ref_per_token_logps": RIGHT,
    "input_features": RIGHT,
    "feature_attention_mask": RIGHT,
}


def find_uniform_groups(advantages: torch.Tensor) -> torch.Tensor:
    """(N,) bool: True where all G advantages are the same. Equal rewards make exactly equal advantages.

    Args:
        advantages: (N, G).
    """
    return advantages.amax(dim=1) == advantages.amin(dim=1)


def replace_groups(
    batch: dict[str, torch.Tensor],
    slots: torch.Tensor,
    fresh: dict[str, torch.Tensor],
    picks: torch.Tensor,
    pad_id: int,
) -> dict[str, torch.Tensor]:
    """`batch` with its groups `slots` replaced by the groups `picks` of `fresh`.

    Args:
        batch, fresh: as the trainer's generation batches: the same keys, prompts and completions of any length.
        slots, picks: (R,) indices into the N groups of each.
        pad_id: token id of padding.

    Returns:
        A new batch; its prompts, completions and mel frames are padded to the longer of the two.
    """
    merged = {}
    for key, value in batch.items():
        other = fresh[key]
        if value.ndim == 0:  # a count over all processes, which the trainer takes anew
            merged[key] = value
            continue
        if key in PADDED_SIDE:
            length = max(value.shape[-1], other.shape[-1])
            filling = pad_id if key.endswith("_ids") else 0
            value, other = (_pad(tensor, length, PADDED_SIDE[key], filling) for tensor in (value, other))
        merged[key] = value.index_copy(0, slots, other[picks])
    return merged


def _pad(tensor: torch.Tensor, length: int, side: int, filling: int) -> torch.Tensor:
    missing = length - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (missing, 0) if side == LEFT else (0, missing), value=filling)
