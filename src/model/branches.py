"""Rollouts: G completions of each of N prompts, decoded as branches that share their prompt's keys in the cache.

A question is one row of the cache, as in the log-prob passes (`trainer/shared_prompt.py`): its prompt, then the sampled
tokens, step by step. Each step adds one token of every unfinished branch, and a mask restricts attention:

    cache          p1 p2 p3 | a1 b1 c1 | a2 c2 | a3 ...        branch b ended with its second token, which is not fed
    a3 attends to   x  x  x |  x       |  x    |  x

So a prompt's keys and values are stored once, and read once for all its branches. A question leaves the cache with its
last branch. Logits processors and stopping criteria are those of `model.generate`.

Shapes: N questions, G generations, B = N * G rows of question and branch, R unfinished rows, A slots of a question's
unfinished branches, P prompt, T tokens so far, K keys in the cache, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import Cache, GenerationConfig, Qwen2AudioForConditionalGeneration
from transformers.generation import GenerationMode

from dataset.encode import Batch

from .generation import prefill
from .qwen2_audio import as_attention_mask

# Owners of keys and slots other than branches. All branches attend to the prompt, none to padding.
PROMPT, PADDING, NOBODY = -1, -2, -3


@torch.no_grad()
def roll_out(
    model: Qwen2AudioForConditionalGeneration,
    questions: Batch,
    generations: int,
    config: GenerationConfig,
    clips: Sequence[torch.Tensor] | None = None,
    anyone: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Sample G completions of each question.

    Args:
        model: on the questions' device.
        config: how to sample and what ends a completion; passes `check_generation`.
        clips: the questions' clips if they are already encoded (`encode_clips`).
        anyone: whether this process continues -> whether any does. Needed if a forward pass involves all processes.

    Returns:
        B lists of token ids, question by question, each with its end token if it was reached.
    """
    first, cache = prefill(model, questions, clips)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **unused) -> list[list[int]]:
        branches = Branches(model, cache, questions.attention_mask)
        ids, rows = input_ids, list(range(len(input_ids)))  # (R, T), and which of the B rows they are
        completions: list[list[int]] = [[] for _ in rows]
        hidden = first.repeat_interleave(generations, dim=0)  # (R, H)
        while True:  # a process without unfinished rows may have to continue with the others: R = 0
            logits = model.lm_head(hidden).float()  # (R, V)
            scores = logits_processor(ids, logits)
            tokens = draw(scores) if generation_config.do_sample else scores.argmax(dim=1)  # (R,)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            # One tensor, so that the device is waited for once.
            sampled = torch.stack([tokens, stopping_criteria(ids, scores).long()], dim=1).tolist()
            for row, (token, _) in zip(rows, sampled, strict=True):
                if token < 0:
                    raise FloatingPointError("the weights are ruined (NaN in sampling); lower --learning_rate")
                completions[row].append(token)
            alive = [place for place, (_, ended) in enumerate(sampled) if not ended]
            if len(alive) < len(rows):
                rows, ids, tokens = [rows[place] for place in alive], ids[alive], tokens[alive]
                for processor in logits_processor:  # the repetition penalty's keeps each row's padding
                    if isinstance(ignored := getattr(processor, "prompt_ignore_length", None), torch.Tensor):
                        processor.prompt_ignore_length = ignored[alive]
            if not anyone(bool(rows)):
                return completions
            hidden = branches.feed(tokens, [divmod(row, generations) for row in rows])

    return model.generate(
        input_ids=questions.input_ids.repeat_interleave(generations, dim=0),
        attention_mask=questions.attention_mask.repeat_interleave(generations, dim=0),
        generation_config=config,
        custom_generate=decode,
    )


class Branches:
    """The cache of N prompts and of the branches behind them. `cache` holds the prompts, (N, heads, P, ...), and grows
    with the tokens fed; `mask` (N, P) is 1 where a prompt has a token."""

    def __init__(self, model: Qwen2AudioForConditionalGeneration, cache: Cache, mask: torch.Tensor):
        self.model, self.cache = model, cache
        self.questions = list(range(len(mask)))  # the question of each row of the cache
        self.owners = torch.where(mask.bool(), PROMPT, PADDING)  # (N, K), the branch of each key
        self.positions = mask.sum(dim=1, keepdim=True)  # (N, 1), of the next token
        self.fed: list[tuple[int, int]] | None = None  # the branches of the last step
        self.slots: torch.Tensor  # (N, A), the branch of each slot of a step
        self.places: torch.Tensor  # (R,), the index in N * A of each branch that is fed

    def feed(self, tokens: torch.Tensor, branches: list[tuple[int, int]]) -> torch.Tensor:
        """Hidden states (R, H) after the next tokens (R,) of `branches`, (question, branch) in order. A branch that is
        missing once is finished."""
        if branches != self.fed:
            self._keep(branches)
        self.owners = torch.cat([self.owners, self.slots], dim=1)
        sees = (self.owners == PROMPT)[:, None] | (self.owners[:, None] == self.slots[..., None])  # (N, A, K)
        ids = tokens.new_zeros(self.slots.numel()).scatter(0, self.places, tokens)
        output = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(ids.view_as(self.slots)),
            attention_mask=as_attention_mask(sees, self.model.config),
            position_ids=self.positions.expand_as(self.slots),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        return output.last_hidden_state.flatten(0, 1)[self.places]

    def _keep(self, branches: list[tuple[int, int]]) -> None:
        """Assign slots to `branches`, and drop questions without any. The cache keeps at least one question."""
        alive = {question: [branch for other, branch in branches if other == question] for question, _ in branches}
        kept = [place for place, question in enumerate(self.questions) if question in alive] or [0]
        if len(kept) < len(self.questions):
            self.cache.batch_select_indices(torch.tensor(kept))
            self.owners, self.positions = self.owners[kept], self.positions[kept]
            self.questions = [self.questions[place] for place in kept]
        width = max(map(len, alive.values()), default=1)
        slots = [alive.get(question, []) for question in self.questions]
        places = [row * width + slot for row, taken in enumerate(slots) for slot in range(len(taken))]
        device = self.owners.device
        self.slots = torch.tensor([taken + [NOBODY] * (width - len(taken)) for taken in slots], device=device)
        self.places = torch.tensor(places, dtype=torch.long, device=device)
        self.fed = branches


def draw(scores: torch.Tensor) -> torch.Tensor:
    """Draw a token (R,) from each row's distribution, given as logits (R, V); -1 for NaN."""
    shares = scores.softmax(dim=1)
    if scores.device.type != "cpu":  # as `multinomial`, which for NaN would end the use of the GPU
        tokens = (shares / torch.empty_like(shares).exponential_()).argmax(dim=1)
    else:  # a number per token of the vocabulary would take a third of the time of the model's layers
        sums = shares.cumsum(dim=1, dtype=torch.float64)  # on a CPU they never fall: no token of share 0 is drawn
        tokens = torch.searchsorted(sums, torch.rand_like(sums[:, :1]) * sums[:, -1:], right=True)[:, 0]
    return tokens.where(shares[:, 0].isfinite(), -1)


def check_generation(config: GenerationConfig) -> None:
    """Raise a `ValueError` for a setting that rollouts do not support."""
    mode = config.get_generation_mode()
    unknown = [] if mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH) else [mode.value.replace("_", " ")]
    # These settings multiply rows, or refer to the rows of the initial batch.
    neutral = {"num_return_sequences": 1, "guidance_scale": 1, "encoder_repetition_penalty": 1}
    neutral |= {"encoder_no_repeat_ngram_size": 0}
    unknown += [name for name, value in neutral.items() if (getattr(config, name) or value) != value]
    if unknown:
        raise ValueError(f"--generation_kwargs: rollouts do not support {', '.join(unknown)}; remove it")
