"""Questions whose G rewards are all equal give no gradient; these pure functions find such groups and put others in
their place. Which questions are tried, and when, is the trainer's business.

Dynamic sampling, as in DAPO (arXiv 2503.14476, section 3.2), on batches of whole groups.

Shapes: N questions, G generations; a batch has tensors (N, G) and (N, G, tokens), and clips (N, ..., frames or
audio tokens) with a list of their N lengths.
"""

from typing import Any

import torch


def find_uniform_groups(advantages: torch.Tensor) -> torch.Tensor:
    """(N,) bool: True where all of (N, G) advantages are the same. Equal rewards make exactly equal advantages."""
    return advantages.amax(dim=1) == advantages.amin(dim=1)


def replace_uniform_groups(batch: dict[str, Any], fresh: dict[str, Any], pad_id: int) -> dict[str, Any]:
    """`batch` with its uniform groups replaced by those of `fresh` that are not, as far as these go.

    Args:
        batch, fresh: as the trainer's generation batches: the same keys, prompts and completions of any length.
        pad_id: token id of padding.

    Returns:
        A new batch; its prompts (on the left), completions and clips are padded to the longer of the two. Scalars,
        which are counts over all processes, are those of `batch`.
    """
    slots = find_uniform_groups(batch["advantages"]).nonzero().flatten()
    picks = (~find_uniform_groups(fresh["advantages"])).nonzero().flatten()[: len(slots)]
    merged = dict(batch)
    taken = dict(zip(slots.tolist(), picks.tolist(), strict=False))
    for key, value in batch.items():
        if isinstance(value, list):
            merged[key] = [fresh[key][taken[row]] if row in taken else own for row, own in enumerate(value)]
        elif value.ndim:
            length = max(value.shape[-1], fresh[key].shape[-1])
            value, other = (_pad(tensor, length, key, pad_id) for tensor in (value, fresh[key]))
            merged[key] = value.index_copy(0, slots[: len(picks)], other[picks])
    return merged


def _pad(tensor: torch.Tensor, length: int, key: str, pad_id: int) -> torch.Tensor:
    missing = length - tensor.shape[-1]
    sides = (missing, 0) if key.startswith("prompt_") else (0, missing)
    return torch.nn.functional.pad(tensor, sides, value=pad_id if key.endswith("_ids") else 0)
