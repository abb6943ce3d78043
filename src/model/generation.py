"""Prompts through the model (`prefill`, for rollouts and evaluation), and the decoding loop of evaluation and `ask.py`.

The loop does what `model.generate` would, but only a prompt's last position goes through the head (the logits of all of
them are the largest tensor of a plain evaluation, and unused), the cache is not copied for every token, a row leaves
with its last token, and in float32 the answer to a question does not depend on the batch that it was computed in:

Padding and batch size change the order of sums, hence the last bits of the logits, and so may swap two tokens that are
nearly tied. Wherever the two best tokens are closer than `NEAR_TIE`, far above the rounding, the choice is made by the
logits of that row computed alone, without padding, cache or threads. The answer is then the one that this lone
computation gives at every step, whatever the batch. (In bfloat16 rounding is too coarse for that: the same batches give
the same answers, other batches may not.)

Nothing of the model's `generation_config` is used. Rollouts share `prefill` only (see `branches.py`): they sample by
settings of TRL and transformers, and an evaluation's answers must not change with those. Not here: prompts' wording.

Shapes: N questions, R rows still being decoded, P prompt tokens (left-padded), T tokens, C completion tokens, H hidden
size, D size of a head, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from transformers import Cache, DynamicLayer, Qwen2AudioForConditionalGeneration
from transformers.generation import logits_process as process
from transformers.utils import logging

from dataset.encode import Batch

from .qwen2_audio import audio_token_id, embed_prompts, encode_clips, group_by_length

logger = logging.get_logger(__name__)

# Tokens are nearly tied when their logits differ by less than this share of the row's largest logit. Batch and lone
# computation were seen to differ by 1e-6 of it; by 1e-5 with weights that amplify (24 layers of 512, deviation 0.1).
NEAR_TIE = 3e-4


@torch.inference_mode()
def generate(
    model: Qwen2AudioForConditionalGeneration,
    batch: Batch,
    ends: list[int],
    max_new_tokens: int,
    choose: Callable[[torch.Tensor, list[int], list[list[int]]], torch.Tensor] | None = None,
) -> list[list[int]]:
    """The completions of N prompts.

    Args:
        model: in evaluation mode, on the batch's device.
        batch: the questions.
        ends: token ids that end a completion.
        max_new_tokens: the longest completion.
        choose: (logits (R, V), the R rows' questions, their completions so far) -> R token ids; `Greedy` by default.

    Returns:
        N lists of token ids, the ending one included if it was reached.
    """
    choose = choose or Greedy(model, batch)
    completions: list[list[int]] = [[] for _ in batch.input_ids]
    rows = list(range(len(completions)))  # which question each row of the shrinking batch is about
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


def prefill(
    model: Qwen2AudioForConditionalGeneration, batch: Batch, clips: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, Cache]:
    """The prompts through encoder and language model, in groups of like length: padding costs as much as tokens do.

    Evaluation and rollouts both start from it: evaluation decodes greedily, bit for bit whatever the batch; rollouts
    sample G branches of each prompt. Within a group prompts are padded on the right, where no token of theirs looks:
    that needs no mask, with which kernels are slower. `clips` are the batch's clips where they are encoded already
    (`encode_clips`).

    Returns:
        Hidden state (N, H) of each prompt's last token, and the cache of all prompts, left-padded to P.
    """
    lengths = batch.attention_mask.sum(dim=1, keepdim=True)  # (N, 1)
    places = torch.arange(batch.input_ids.shape[1], device=lengths.device)  # (P,)
    groups = group_by_length(lengths[:, 0].tolist())
    hidden, caches = [], []
    for group in groups:
        part, kept = batch.take(group), lengths[group]  # R rows, T tokens
        rows, tokens = torch.arange(len(group), device=kept.device)[:, None], part.input_ids.shape[1]
        encoded = clips and [clips[row] for row in group]
        inputs = _embed(model, part, encoded)[rows, (places[:tokens] - kept) % tokens]  # (R, T, H), padded behind
        output = model.model.language_model(inputs_embeds=inputs, use_cache=True)
        hidden.append(output.last_hidden_state[rows, kept - 1][:, 0])
        # Padding back to the left, up to the length of the whole batch: (R, P, heads, D).
        source = (places - len(places) + kept).clamp(min=0)  # (R, P)
        layers, cache = output.past_key_values.layers, []
        while layers:  # freed once padded, as below: all of it twice would not fit
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
    """A layer's cache that grows by an eighth at a time: `DynamicLayer` copies all of it for every token.

    `keys` and `values` are views of the filled part of buffers, and their strides tell how much room is behind it.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            return super().update(keys, values)
        self.keys, self.values = append(self.keys, keys), append(self.values, values)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; only those that change their place are copied."""
        moved = {place: index for place, index in enumerate(indices.tolist()) if place != index}
        for states in (self.keys, self.values):
            states[list(moved)] = states[list(moved.values())]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]


def append(states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """States (R, heads, T, D) with more of them behind, in the room that is there or else in a larger buffer."""
    rows, heads, length, size = states.shape
    stop = length + new.shape[2]
    if stop * size > states.stride(1):
        return torch.cat([states, new, new.new_empty(rows, heads, stop // 8, size)], dim=2)[:, :, :stop]
    states = states.as_strided((rows, heads, stop, size), states.stride(), states.storage_offset())
    states[:, :, length:] = new
    return states


class Greedy:
    """The best token of each row but `<|AUDIO|>`; in float32, the one that the row would get alone (see above)."""

    def __init__(self, model: Qwen2AudioForConditionalGeneration, batch: Batch):
        self.model, self.batch = model, batch
        self.prompts: dict[int, torch.Tensor] = {}  # question -> its prompt's embeddings, computed alone, (1, P, H)
        self.near_ties = 0  # met so far
        self.pool = ThreadPoolExecutor(torch.get_num_threads())  # rows side by side, a thread for each

    def __call__(self, logits: torch.Tensor, rows: list[int], completions: list[list[int]]) -> torch.Tensor:
        lowest = self._forbid_audio(logits)  # (R,)
        if self.model.dtype != torch.float32:
            return logits.argmax(dim=1)
        best, tokens = logits.topk(2, dim=1)  # (R, 2)
        scale = torch.maximum(best[:, 0].abs(), lowest.abs())
        places = (best[:, 0] - best[:, 1] < NEAR_TIE * scale).nonzero()[:, 0].tolist()
        asked = [rows[place] for place in places], [completions[place] for place in places]
        for place, lone in zip(places, self.pool.map(self.lone_logits, *asked), strict=True):
            tokens[place, 0] = lone.argmax()
            self.near_ties += 1
            if float((lone - logits[place]).abs().max()) > NEAR_TIE / 2 * float(scale[place]):
                logger.warning_once("Raise NEAR_TIE in src/model/generation.py: answers may depend on the batch size.")
        return tokens[:, 0]

    @torch.inference_mode()
    def lone_logits(self, row: int, completion: list[int]) -> torch.Tensor:
        """Logits (V,) of one question's next token, from nothing but the question and its tokens so far."""
        with single_thread():
            if row not in self.prompts:
                self.prompts[row] = _embed(self.model, self.batch.take([row]))
            inputs = torch.cat([self.prompts[row], embed_tokens(self.model, [completion])], dim=1)
            hidden = self.model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[:, -1])
        self._forbid_audio(logits)
        return logits[0]

    def _forbid_audio(self, logits: torch.Tensor) -> torch.Tensor:
        """Make `<|AUDIO|>`, which stands for sound and is no text, the worst choice; return the rows' lowest logits."""
        lowest = logits.amin(dim=1)
        logits[:, audio_token_id(self.model)] = lowest
        return lowest


class Sampler:
    """Tokens drawn as the original drew them, by the defaults of Qwen2-Audio-7B-Instruct that it inherited: repetition
    penalty 1.1 (over prompt and completion), temperature 0.7, top_k 20, top_p 0.5. Every question has a stream of
    random numbers of its own, from `seed` and its name (N `names`), so that a draw does not depend on the batch.
    """

    def __init__(self, model: Qwen2AudioForConditionalGeneration, batch: Batch, names: list[str], seed: int):
        self.audio_token_id = audio_token_id(model)
        kept = zip(batch.input_ids.cpu(), batch.attention_mask.cpu().bool(), strict=True)
        self.prompts = [ids[mask].tolist() for ids, mask in kept]
        digests = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names]
        self.streams = [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]
        warpers = process.TemperatureLogitsWarper(0.7), process.TopKLogitsWarper(20), process.TopPLogitsWarper(0.5)
        self.process = process.LogitsProcessorList([process.RepetitionPenaltyLogitsProcessor(1.1), *warpers])

    def __call__(self, logits: torch.Tensor, rows: list[int], completions: list[list[int]]) -> torch.Tensor:
        logits[:, self.audio_token_id] = -torch.inf
        drawn = []
        for scores, row, completion in zip(logits.cpu(), rows, completions, strict=True):
            probabilities = self.process(torch.tensor([self.prompts[row] + completion]), scores[None]).softmax(dim=1)
            drawn.append(probabilities.multinomial(1, generator=self.streams[row])[0])
        return torch.cat(drawn)


@torch.inference_mode()
def score(model: Qwen2AudioForConditionalGeneration, batch: Batch, completions: list[list[int]]) -> torch.Tensor:
    """Log-probabilities (K,) of K completions, each of at least one token, of the one question in `batch`."""
    length = max(map(len, completions))
    padded = [completion + [completion[-1]] * (length - len(completion)) for completion in completions]
    prompts = _embed(model, batch).expand(len(padded), -1, -1)  # (K, P, H)
    inputs = torch.cat([prompts, embed_tokens(model, padded)], dim=1)
    hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logps = model.lm_head(hidden[:, -length - 1 : -1]).float().log_softmax(dim=-1)  # (K, C, V)
    taken = logps.gather(2, torch.tensor(padded, device=logps.device)[..., None])[..., 0]  # (K, C)
    return torch.stack([row[: len(completion)].sum() for row, completion in zip(taken, completions, strict=True)])


def _embed(
    model: Qwen2AudioForConditionalGeneration, batch: Batch, clips: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    clips = clips or encode_clips(model.model, batch.input_features, batch.frames)
    return embed_prompts(model.model, batch.input_ids, clips)


def embed_tokens(model: Qwen2AudioForConditionalGeneration, ids: list[list[int]]) -> torch.Tensor:
    """Embeddings (R, T, H) of R rows of T token ids."""
    embedding = model.get_input_embeddings()
    return embedding(torch.tensor(ids, dtype=torch.long, device=embedding.weight.device))


@contextmanager
def single_thread() -> Iterator[None]:
    """Sums in one order, whatever the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
