"""How evaluation picks tokens: exact greedy choice, or the original's sampling; and the log-probability of a reply.

Padding and batch size change the order of sums, hence the last bits of the logits, and may swap two tokens that are
nearly tied. Where the two best tokens are closer than `NEAR_TIE`, far above the rounding, `Greedy` decides by logits
computed for that row alone, without padding, cache or threads: in float32 an answer does not depend on the batch. In
bfloat16 rounding is too coarse for that: equal batches give equal answers, other batches may not.

Shapes: N questions, R rows still being decoded, P prompt tokens, C completion tokens, H hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from transformers import Qwen2AudioForConditionalGeneration
from transformers.generation import logits_process as process
from transformers.utils import logging

from dataset.encode import Batch
from model.generation import embed_batch, embed_tokens, forbid_audio
from model.qwen2_audio import audio_token_id

logger = logging.get_logger(__name__)

# Tokens are nearly tied if their logits differ by less than this share of the row's largest logit. Batching changed
# logits by 1e-6 of it at most, with amplifying weights (24 layers of 512, standard deviation 0.1) by 1e-5.
NEAR_TIE = 3e-4


class Greedy:
    """Chooses the best token of each row; in float32, the one that the row gets alone (see above)."""

    def __init__(self, model: Qwen2AudioForConditionalGeneration, batch: Batch):
        self.model, self.batch = model, batch
        self.prompts: dict[int, torch.Tensor] = {}  # question -> embeddings of its prompt, computed alone, (1, P, H)
        self.near_ties = 0  # number of choices made by lone logits
        self.pool = ThreadPoolExecutor(torch.get_num_threads())  # one row per thread

    def __call__(self, logits: torch.Tensor, rows: list[int], completions: list[list[int]]) -> torch.Tensor:
        lowest = forbid_audio(self.model, logits)  # (R,)
        if self.model.dtype != torch.float32:
            return logits.argmax(dim=1)
        best, tokens = logits.topk(2, dim=1)  # (R, 2)
        scale = torch.maximum(best[:, 0].abs(), lowest.abs())
        places = (best[:, 0] - best[:, 1] < NEAR_TIE * scale).nonzero()[:, 0].tolist()
        tied = [rows[place] for place in places], [completions[place] for place in places]
        self.near_ties += len(places)
        for place, lone in zip(places, self.pool.map(self.lone_logits, *tied), strict=True):
            tokens[place, 0] = lone.argmax()
            if float((lone - logits[place]).abs().max()) > NEAR_TIE / 2 * float(scale[place]):
                logger.warning_once(f"Answers may depend on the batch size. Raise NEAR_TIE in {__file__}.")
        return tokens[:, 0]

    @torch.inference_mode()
    def lone_logits(self, row: int, completion: list[int]) -> torch.Tensor:
        """Logits (V,) of one question's next token, computed from the question and its tokens so far alone."""
        with single_thread():
            if row not in self.prompts:
                self.prompts[row] = embed_batch(self.model, self.batch.take([row]))
            inputs = torch.cat([self.prompts[row], embed_tokens(self.model, [completion])], dim=1)
            hidden = self.model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[:, -1])
        forbid_audio(self.model, logits)
        return logits[0]


class Sampler:
    """Draws tokens as the original did, with the defaults of Qwen2-Audio-7B-Instruct: repetition penalty 1.1 on prompt
    and completion, temperature 0.7, top_k 20, top_p 0.5. Each question has its own random numbers, seeded by `seed` and
    its name (N `names`), so that a draw does not depend on the batch."""

    def __init__(self, model: Qwen2AudioForConditionalGeneration, batch: Batch, names: list[str], seed: int):
        self.audio_token_id = audio_token_id(model)
        masks = batch.attention_mask.cpu().bool()
        self.prompts = [ids[mask].tolist() for ids, mask in zip(batch.input_ids.cpu(), masks, strict=True)]
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
    """Log-probabilities (K,) of K completions, each of at least one token, of the single question in `batch`."""
    length = max(map(len, completions))
    padded = [completion + [completion[-1]] * (length - len(completion)) for completion in completions]
    prompts = embed_batch(model, batch).expand(len(padded), -1, -1)  # (K, P, H)
    inputs = torch.cat([prompts, embed_tokens(model, padded)], dim=1)
    hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logps = model.lm_head(hidden[:, -length - 1 : -1]).float().log_softmax(dim=-1)  # (K, C, V)
    taken = logps.gather(2, torch.tensor(padded, device=logps.device)[..., None])[..., 0]  # (K, C)
    return torch.stack([row[: len(completion)].sum() for row, completion in zip(taken, completions, strict=True)])


@contextmanager
def single_thread() -> Iterator[None]:
    """Sum in the same order on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
