"""Prompts through the model (`prefill`, for rollouts and evaluation), and the decoding loop of evaluation and `ask.py`.

The loop replaces `model.generate`: only a prompt's last position goes through the head, since all logits would be the
largest tensor of an evaluation, the cache is not copied for every token, and a finished row leaves the batch.

Shapes: N questions, R rows still being decoded, P prompt tokens (left-padded), T tokens, C completion tokens, H hidden
size, D size of a head, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import Cache, DynamicLayer, Qwen2AudioForConditionalGeneration

from dataset.encode import Batch

from .qwen2_audio import audio_token_id, embed_prompts, encode_clips, group_by_length

# (logits (R, V), the R rows' questions, their completions so far) -> R token ids
Choose = Callable[[torch.Tensor, list[int], list[list[int]]], torch.Tensor]


@torch.inference_mode()
def generate(
    model: Qwen2AudioForConditionalGeneration, batch: Batch, ends: list[int], max_new_tokens: int, choose: Choose
) -> list[list[int]]:
    """The completions of N prompts.

    Args:
        model: in evaluation mode, on the batch's device.
        ends: token ids that end a completion.
        max_new_tokens: the longest completion.
        choose: picks the next tokens, never `<|AUDIO|>` (`forbid_audio`).

    Returns:
        N lists of token ids, each with its end token if it was reached.
    """
    completions: list[list[int]] = [[] for _ in batch.input_ids]
    rows = list(range(len(completions)))  # the question of each row of the shrinking batch
    mask, (hidden, cache) = batch.attention_mask, prefill(model, batch)
    positions = mask.sum(dim=1, keepdim=True)  # (R, 1), of the next token
    for _ in range(max_new_tokens):
        logits = model.lm_head(hidden).float()  # (R, V)
        tokens = choose(logits, rows, [completions[row] for row in rows]).tolist()
        for row, token in zip(rows, tokens, strict=True):
            completions[row].append(token)
        alive = [place for place, token in enumerate(tokens) if token not in ends]
        if not alive:
            break
        if len(alive) < len(rows):
            gone = set(range(len(alive))).difference(alive)
            kept = [alive.pop() if place in gone else place for place in range(len(alive))]
            cache.batch_select_indices(torch.tensor(kept))
            mask, positions = mask[kept], positions[kept]
            rows, tokens = [rows[place] for place in kept], [tokens[place] for place in kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        inputs = embed_tokens(model, [[token] for token in tokens])  # (R, 1, H)
        output = model.model.language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden, positions = output.last_hidden_state[:, -1], positions + 1
    return completions


def forbid_audio(model: Qwen2AudioForConditionalGeneration, logits: torch.Tensor) -> torch.Tensor:
    """Set the logit of `<|AUDIO|>` in `logits` (R, V) to its row's lowest, in place. Return the lowest ones (R,)."""
    lowest = logits.amin(dim=1)
    logits[:, audio_token_id(model)] = lowest
    return lowest


def prefill(
    model: Qwen2AudioForConditionalGeneration, batch: Batch, clips: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, Cache]:
    """Hidden state (N, H) of each prompt's last token, and the cache of all prompts, left-padded to P. `clips` are the
    batch's clips if they are already encoded (`encode_clips`). Prompts pass in groups of similar length, since padding
    costs as much as tokens; there they are padded on the right, since kernels are slower with a mask."""
    lengths = batch.attention_mask.sum(dim=1, keepdim=True)  # (N, 1)
    places = torch.arange(batch.input_ids.shape[1], device=lengths.device)  # (P,)
    groups = group_by_length(lengths[:, 0].tolist())
    hidden, caches = [], []
    for group in groups:
        part, kept = batch.take(group), lengths[group]  # R rows, T tokens
        rows, tokens = torch.arange(len(group), device=kept.device)[:, None], part.input_ids.shape[1]
        encoded = clips and [clips[row] for row in group]
        inputs = embed_batch(model, part, encoded)[rows, (places[:tokens] - kept) % tokens]  # (R, T, H), right-padded
        output = model.model.language_model(inputs_embeds=inputs, use_cache=True)
        hidden.append(output.last_hidden_state[rows, kept - 1][:, 0])
        # Padding moves back to the left, up to the length of the whole batch: (R, P, heads, D).
        source = (places - len(places) + kept).clamp(min=0)  # (R, P)
        layers, cache = output.past_key_values.layers, []
        while layers:  # here and below, each layer is freed once padded: two copies of all would not fit
            layer = layers.pop(0)
            cache.append((layer.keys[rows, :, source], layer.values[rows, :, source]))
        caches.append(cache)
    # Back to the order of the batch.
    order = torch.tensor([row for group in groups for row in group], device=lengths.device).argsort()
    merged = Cache(layer_class_to_replicate=RoomyLayer)
    for index in range(len(caches[0])):
        layer = [cache.pop(0) for cache in caches]
        keys, values = (torch.cat(states)[order].transpose(1, 2) for states in zip(*layer, strict=True))
        merged.update(keys, values, index)
    return torch.cat(hidden)[order], merged


class RoomyLayer(DynamicLayer):
    """A layer's cache that grows by an eighth at a time. `DynamicLayer` copies all of it for every token. `keys` and
    `values` are views of the filled part of larger buffers, whose size follows from the strides."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            return super().update(keys, values)
        self.keys, self.values = append(self.keys, keys), append(self.values, values)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order. Only rows that change their place are copied."""
        moved = {place: index for place, index in enumerate(indices.tolist()) if place != index}
        for states in (self.keys, self.values):
            states[list(moved)] = states[list(moved.values())]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]


def append(states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """States (R, heads, T, D) with `new` ones appended: in place if their buffer has room, else in a larger buffer."""
    rows, heads, length, size = states.shape
    stop = length + new.shape[2]
    if stop * size > states.stride(1):
        return torch.cat([states, new, new.new_empty(rows, heads, stop // 8, size)], dim=2)[:, :, :stop]
    states = states.as_strided((rows, heads, stop, size), states.stride(), states.storage_offset())
    states[:, :, length:] = new
    return states


def embed_batch(
    model: Qwen2AudioForConditionalGeneration, batch: Batch, clips: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Embeddings (N, P, H) of the prompts; `clips` as for `prefill`."""
    clips = clips or encode_clips(model.model, batch.input_features, batch.frames)
    return embed_prompts(model.model, batch.input_ids, clips)


def embed_tokens(model: Qwen2AudioForConditionalGeneration, ids: list[list[int]]) -> torch.Tensor:
    """Embeddings (R, T, H) of R rows of T token ids."""
    embedding = model.get_input_embeddings()
    return embedding(torch.tensor(ids, dtype=torch.long, device=embedding.weight.device))
