"""Rollouts: G completions of each of N prompts, decoded as branches that share their prompt's place in the cache.

A question is one row, as in the log-prob passes (`trainer/shared_prompt.py`): its prompt, then what its branches have
sampled, step by step. Each step brings one token of every branch that goes on, and a mask says who sees what:

    cache          p1 p2 p3 | a1 b1 c1 | a2 c2 | a3 ...        branch b ended with its second token, which nobody sees
    a3 attends to   x  x  x |  x       |  x    |  x

So a prompt's keys and values are stored once, and read once for all its branches. A branch that has ended is fed no
more, and a question whose branches all have leaves with its keys. Whatever limits sampling (temperature, penalties,
lengths) is what transformers' `generate` makes of the settings. Not here: greedy decoding that is exact whatever the
batch, see `generation.py`.

Shapes: N questions, G generations, B = N * G rows of question and branch, R rows that still go on, A slots of a
question's branches that go on, P prompt, T tokens so far, K keys in the cache, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import Cache, GenerationConfig, Qwen2AudioForConditionalGeneration
from transformers.generation import GenerationMode

from dataset.encode import Batch

from .generation import prefill
from .qwen2_audio import as_attention_mask

# What a place in the cache belongs to, where it is no branch: all see the prompt, nobody sees padding.
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
    """G completions of each question.

    Args:
        model: on the questions' device.
        config: how to sample, and what ends a completion; a mode of `check_generation`.
        clips: the questions' clips where they are encoded already (`encode_clips`).
        anyone: whether any process goes on, from whether this one does; where a forward pass needs all of them.

    Returns:
        B lists of token ids, question by question, each with the token that ended it, if one did.
    """
    first, cache = prefill(model, questions, clips)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **unused) -> list[list[int]]:
        branches = Branches(model, cache, questions.attention_mask)
        ids, rows = input_ids, list(range(len(input_ids)))  # (R, T), and which of the B rows they are
        completions: list[list[int]] = [[] for _ in rows]
        hidden = first.repeat_interleave(generations, dim=0)  # (R, H)
        while True:  # a process that has no row left, but others to go on with, has tensors of R = 0
            logits = model.lm_head(hidden).float()  # (R, V)
            scores = logits_processor(ids, logits)
            tokens = draw(scores) if generation_config.do_sample else scores.argmax(dim=1)  # (R,)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            sampled = torch.stack([tokens, stopping_criteria(ids, scores).long()], dim=1).tolist()  # waits once
            for row, (token, _) in zip(rows, sampled, strict=True):
                completions[row].append(token)
            going = [place for place, (_, over) in enumerate(sampled) if not over]
            if len(going) < len(rows):
                rows, ids, tokens = [rows[place] for place in going], ids[going], tokens[going]
                for processor in logits_processor:  # that of the repetition penalty knows each row's padding
                    if isinstance(ignored := getattr(processor, "prompt_ignore_length", None), torch.Tensor):
                        processor.prompt_ignore_length = ignored[going]
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
    """The cache of N prompts, and of their branches behind them.

    Args:
        cache: of the prompts, (N, heads, P, ...), which it grows by what is fed.
        mask: (N, P), 1 where a prompt has a token.
    """

    def __init__(self, model: Qwen2AudioForConditionalGeneration, cache: Cache, mask: torch.Tensor):
        self.model, self.cache = model, cache
        self.questions = list(range(len(mask)))  # which question each row of the cache is about
        self.owners = torch.where(mask.bool(), PROMPT, PADDING)  # (N, K), whose token each key is
        self.positions = mask.sum(dim=1, keepdim=True)  # (N, 1), of the next token
        self.fed: list[tuple[int, int]] | None = None
        self.slots: torch.Tensor  # (N, A), which branch has which place in a step
        self.places: torch.Tensor  # (R,), where in N * A the rows that are fed stand

    def feed(self, tokens: torch.Tensor, branches: list[tuple[int, int]]) -> torch.Tensor:
        """Hidden states (R, H) after the next token (R,) of `branches`, (question, branch) each, in order. Those that
        are not among them are not fed again."""
        if branches != self.fed:
            self._leave_out_all_but(branches)
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

    def _leave_out_all_but(self, branches: list[tuple[int, int]]) -> None:
        """Give `branches` their slots, and drop the questions that have none; one stays, in any case."""
        going = {question: [branch for asked, branch in branches if asked == question] for question, _ in branches}
        kept = [place for place, question in enumerate(self.questions) if question in going] or [0]
        if len(kept) < len(self.questions):
            self.cache.batch_select_indices(torch.tensor(kept))
            self.owners, self.positions = self.owners[kept], self.positions[kept]
            self.questions = [self.questions[place] for place in kept]
        width = max(map(len, going.values()), default=1)
        slots = [going.get(question, []) for question in self.questions]
        places = [row * width + slot for row, taken in enumerate(slots) for slot in range(len(taken))]
        device = self.owners.device
        self.slots = torch.tensor([taken + [NOBODY] * (width - len(taken)) for taken in slots], device=device)
        self.places = torch.tensor(places, dtype=torch.long, device=device)
        self.fed = branches


def draw(scores: torch.Tensor) -> torch.Tensor:
    """A token (R,) from each row's distribution, given as logits (R, V); a `RuntimeError` where one is NaN."""
    shares = scores.softmax(dim=1)
    if scores.device.type != "cpu" or not bool(shares.sum().isfinite()):
        return shares.multinomial(1)[:, 0]
    # `multinomial` draws a number for every token of the vocabulary, which takes a third as long as the model's layers.
    # On a CPU sums are taken in order: they never fall, so that no token of share 0 is drawn.
    sums = shares.cumsum(dim=1, dtype=torch.float64)
    return torch.searchsorted(sums, torch.rand_like(sums[:, :1]) * sums[:, -1:], right=True)[:, 0]


def check_generation(config: GenerationConfig) -> None:
    """Raise a `ValueError` for a setting that rollouts do not know."""
    mode = config.get_generation_mode()
    unknown = [] if mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH) else [mode.value.replace("_", " ")]
    # These make several rows of one, or look at the prompts' rows as they were when all of them went on.
    idle = {"num_return_sequences": 1, "guidance_scale": 1, "encoder_repetition_penalty": 1}
    idle |= {"encoder_no_repeat_ngram_size": 0}
    unknown += [name for name, value in idle.items() if (getattr(config, name) or value) != value]
    if unknown:
        raise ValueError(
            f"--generation_kwargs asks for {', '.join(unknown)}, which rollouts do not know: they sample "
            "--num_generations completions, or take the best token; leave it away"
        )
