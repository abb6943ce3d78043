"""Log-probs of a group's G completions with their prompt computed once: `pack` the group into one row, `score` it with
the model, `unpack` the log-probs.

One row holds a question's prompt and all its completions as branches:

    ids        p1 p2 | p3 a1 a2 | p3 b1        prompt p1 p2 p3, completions a1 a2 a3 and b1 b2
    positions   0  1 |  2  3  4 |  2  3
    labels           | a1 a2 a3 | b1 b2        what the branches' positions predict, already aligned

    may attend to    p1 p2  p3 a1 a2  p3 b1
    p1                x
    p2                x  x
    p3 (branch a)     x  x   x
    a1                x  x   x  x
    a2                x  x   x  x  x
    p3 (branch b)     x  x              x
    b1                x  x              x  x

Every branch starts with the prompt's last token, which predicts the branch's first. Positions restart at the prompt's
end, so each token sees exactly what it would see in a row of its own: log-probs and gradients equal those of G separate
rows, for any causal model with relative (rotary) or absolute positions and no attention across a sliding window.
Assumes that prompts are left-padded and completions right-padded, as TRL has them.

Shapes: N questions, G generations, P prompt, C completion, K branch tokens, T = P - 1 + K packed tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch

from model.qwen2_audio import as_attention_mask, needed_frames_only

ATTENTION = ("sdpa", "eager")  # the implementations that take an arbitrary mask, which packed rows need
IGNORE = -100  # a label that is not scored


def check_attention(implementation: str) -> None:
    """Raise a `ValueError` for an implementation that takes no arbitrary mask."""
    if implementation not in ATTENTION:
        usable = " or ".join(ATTENTION)
        raise ValueError(f"attn_implementation {implementation!r} takes no mask of a shared prompt; use {usable}")


@dataclass
class PackedGroups:
    """N packed rows, and where each of their tokens came from."""

    input_ids: torch.Tensor  # (N, T)
    position_ids: torch.Tensor  # (N, T)
    sees: torch.Tensor  # (N, T, T), True where the query (dim 1) may attend to the key (dim 2)
    labels: torch.Tensor  # (N, K), the token that each of the last K = T - (P - 1) positions predicts, or IGNORE
    source: torch.Tensor  # (N, K), where that token stands among the group's G * C completion tokens


def pack(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_ids: torch.Tensor, completion_mask: torch.Tensor
) -> PackedGroups:
    """Pack each question's prompt and completions into one row, without the completions' padding.

    Args:
        prompt_ids, prompt_mask: (N, P), left-padded; every prompt has at least one token.
        completion_ids, completion_mask: (N, G, C), right-padded; a completion may be masked as a whole.

    Returns:
        `PackedGroups` with K = the completion tokens of the largest group, at least 1.
    """
    generations, length = completion_ids.shape[1:]
    # The branches with their padding: each is the completion shifted right by one, behind the prompt's last token.
    last = prompt_ids[:, -1:, None].expand(-1, generations, 1)
    branch_ids = torch.cat([last, completion_ids[:, :, :-1]], dim=2).flatten(1)  # (N, G * C)
    token = completion_mask.bool().flatten(1)  # (N, G * C)
    labels = completion_ids.flatten(1).masked_fill(~token, IGNORE)  # (N, G * C)
    # Drop the padding: tokens to the front in their order, then cut to the longest group of the batch.
    kept = max(1, int(token.sum(dim=1).max()))  # the only value that the host waits for in a pass
    source = (~token).long().argsort(dim=1, stable=True)[:, :kept]  # (N, K)
    branch, offset = source // length, source % length  # (N, K), of which branch, and where in it
    torch._assert_async(prompt_mask[:, -1].bool().all(), "prompts must be left-padded")

    prompt = prompt_mask[:, :-1].bool()  # (N, P - 1)
    prompt_positions = (prompt.long().cumsum(dim=1) - 1).clamp(min=0)
    # Which part of the row a position belongs to: -1 the prompt, else the number of its branch.
    part = torch.cat([torch.full_like(prompt_ids[:, :-1], -1), branch], dim=1)  # (N, T)
    is_token = torch.cat([prompt, token.gather(1, source)], dim=1)  # (N, T)
    may_see = (part[:, None, :] == -1) | (part[:, None, :] == part[:, :, None])  # (N, T query, T key)
    may_see = (may_see & is_token[:, None, :]).tril()
    may_see.diagonal(dim1=1, dim2=2).fill_(True)  # padding sees itself: a softmax over nothing is NaN
    return PackedGroups(
        input_ids=torch.cat([prompt_ids[:, :-1], branch_ids.gather(1, source)], dim=1),
        position_ids=torch.cat([prompt_positions, prompt.sum(dim=1, keepdim=True) + offset], dim=1),
        sees=may_see,
        labels=labels.gather(1, source),
        source=source,
    )


def score(model, base, packed: PackedGroups, clips: dict[str, Any]):
    """Forward pass of packed rows.

    Args:
        model: with TRL's fused head, wrapped by an engine or not.
        base: the model itself, below engines and adapters.
        clips: of the N questions, `input_features` or `encoded_clips`, and `frames`, see `needed_frames_only`.

    Returns:
        The fused head's output: `log_probs`, and `entropy` where the head was asked for it, (N, K).
    """
    scored = packed.labels.shape[1]

    def keep_scored(backbone, args, output):  # on a CPU, the fused head scores every position that it gets
        output.last_hidden_state = output.last_hidden_state[:, -scored:]
        return output

    with needed_frames_only(base), base.model.register_forward_hook(keep_scored):
        return model(
            input_ids=packed.input_ids,
            attention_mask=as_attention_mask(packed.sees, base.config),
            position_ids=packed.position_ids,
            shift_labels=packed.labels,
            fused_lm_head=True,
            **clips,
        )


def unpack(values: torch.Tensor, packed: PackedGroups, generations: int, length: int) -> torch.Tensor:
    """Bring `values` (N, K) of packed branches, e.g. the log-prob of each position's label, back to their places in the
    G `generations` of `length` C: (N, G, C), zero where there is no completion token. Differentiable."""
    flat = values.new_zeros(len(values), generations * length)
    scattered = flat.scatter(1, packed.source, values.masked_fill(packed.labels == IGNORE, 0))
    return scattered.unflatten(1, (generations, length))
