"""Groups that cost no policy pass, since their gradient is exactly zero: what the trainer needs to leave them out.

Where all G rewards of a question are equal, its advantages are 0, and with `--beta 0` so is all that the group adds to
the loss. What TRL logs of the pass beside is known without it: the ratio of the policy to itself is 1, and the entropy
of a token's distribution can be taken from the logits that it was sampled from, by the same weights. The loss itself
stays TRL's, on all rows: those left out have log-probs of 0, from which nothing flows back.

Leaves out settings under which a group without an advantage has a gradient after all, or other entropies than at its
rollout: see `adds_nothing`. Dropout (of adapters) draws other numbers for rollout and pass; there the entropy is that
of the rollout's draw.

Shapes: N questions, G generations, B = N * G completions, P prompt, C completion, V vocabulary.
"""

from typing import Any

import torch
from trl import GRPOTrainer

from dataset.encode import needed_frames

FRAMES = 3  # mel frames of the shortest clip that makes an audio token


def adds_nothing(trainer: GRPOTrainer) -> bool:
    """Whether a group without advantages adds nothing to the gradient, and was sampled by the weights it is scored by.

    It does not by any of TRL's losses: each multiplies the advantage, by a finite ratio of 1 where the rollout's
    weights are the pass's, that is where one optimizer step uses up whole rollouts. Exceptions are the KL term, the
    bonus for entropy, the loss of a mixture of experts, and a share of tokens that is chosen by all entropies (whose
    rounding would decide).
    """
    args = trainer.args
    same_weights = args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0
    own_terms = trainer.beta != 0 or trainer._entropy_bonus_enabled or trainer.aux_loss_enabled
    chosen = trainer.top_entropy_quantile < 1
    return trainer.model.training and same_weights and not (own_terms or chosen or trainer.use_vllm)


def find_idle_groups(advantages: torch.Tensor) -> torch.Tensor:
    """(N,) bool: True where all of (N, G) advantages are exactly 0. Equal rewards whose mean was rounded are not."""
    return (advantages == 0).all(dim=1)


class RolloutEntropies:
    """Collects, in a rollout, the entropy in nats of each token's distribution.

    As TRL's fused head has them: of the logits as they are, over the temperature, without what sampling forbids.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self._steps: list[tuple[torch.Tensor, list[int]]] = []

    def __call__(self, logits: torch.Tensor, rows: list[int]) -> None:
        """One step's logits (R, V), of these of the B rows."""
        scaled = logits / self.temperature
        scaled -= scaled.amax(dim=-1, keepdim=True)
        normalizer = scaled.logsumexp(dim=-1)
        self._steps.append((normalizer - scaled.softmax(dim=-1).mul_(scaled).sum(dim=-1), rows))

    def as_rows(self, count: int) -> torch.Tensor:
        """(B, C), 0 behind a completion's end."""
        values = self._steps[0][0].new_zeros(count, len(self._steps))
        for step, (entropies, rows) in enumerate(self._steps):
            values[rows, step] = entropies
        return values


def fill_in(values: torch.Tensor, found: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`values` (N, G, C) with rows `found` (K * G, C) of K groups in their `places` (K,): (B, C). Differentiable."""
    rows = found.to(values.dtype).unflatten(0, (len(places), -1))
    return values.index_copy(0, places, rows).flatten(0, 1)


def shortest_question(
    ids: torch.Tensor, clips: dict[str, Any], audio_token: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], dict[str, Any]]:
    """The cheapest pass in which every weight takes part: an audio token, a text token and a completion of one.

    Args:
        ids: (N, G, P + C), of which only a token is taken.
        clips: of N questions, features or encoded; the first frames of the first are taken.

    Returns:
        Token ids and mask (1, 1, 3), how many completion tokens there are, and the clip's inputs (1, ...).
    """
    last = ids[:1, :1, -1:]
    tokens = torch.cat([torch.full_like(last, audio_token), last, last], dim=2)
    (name, values), *_ = clips.items()
    kept = 1 if name == "encoded_clips" else needed_frames(FRAMES, values.shape[2])
    return tokens, torch.ones_like(tokens), [1], {name: values[:1, :, :kept], "frames": [FRAMES]}
