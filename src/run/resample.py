"""Questions whose G rewards are all equal give no gradient: fresh questions replace them.

Dynamic sampling, as in DAPO (arXiv 2503.14476, section 3.2), on whole groups. Shapes: N questions, G generations.
"""

from dataclasses import replace
from itertools import islice
from statistics import fmean

import torch
from accelerate.utils import gather_object
from torch.nn.functional import pad

from dataset.encode import Batch
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.rollout import Rollout


def resample_uniform_groups(trainer: AudioGRPOTrainer, rounds: int) -> None:
    """Wrap the trainer's `roll_out`: at most `rounds` further rounds of rollouts replace uniform groups.

    All processes take the same number of rounds with the same number of questions: as many as the process that lacks
    most. The order of fresh questions follows from the seed and from how many micro-batches were taken.
    """
    roll_out, pad_id = trainer.roll_out, trainer.processing_class.tokenizer.pad_token_id

    def resampled(rows: list[dict]) -> Rollout:
        rollout = roll_out(rows)
        if not trainer.model.training:
            return rollout
        accumulated = trainer.args.gradient_accumulation_steps  # the count is the same in a resumed run
        before = trainer.state.global_step * accumulated + trainer._step % accumulated
        generator = torch.Generator().manual_seed(trainer.args.seed + 1_000_003 * (before + 1))
        order = torch.randperm(len(trainer.train_dataset), generator=generator).tolist()
        own = order[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
        fresh = (row for row in map(trainer.train_dataset.__getitem__, own) if row not in rollout.rows)
        shares = []  # of uniform groups, before each round and after the last
        while True:
            uniform = find_uniform_groups(rollout.advantages)
            shares.append(fmean(gather_object(uniform.tolist())))
            drawn = list(islice(fresh, max(gather_object([int(uniform.sum())]))))
            count = min(gather_object([len(drawn)]))
            if len(shares) > rounds or count == 0:  # no group is lacking, or a process has tried all its questions
                break
            rollout = replace_uniform_groups(rollout, roll_out(drawn[:count]), pad_id)
        metrics = trainer._metrics["train"]
        metrics["groups/uniform_share"].append(shares[0])
        metrics["groups/uniform_share_left"].append(shares[-1])
        metrics["groups/resample_rounds"].append(len(shares) - 1)
        return rollout

    trainer.roll_out = resampled


def find_uniform_groups(advantages: torch.Tensor) -> torch.Tensor:
    """(N,) bool: True where all of (N, G) advantages are the same. Equal rewards make exactly equal advantages."""
    return advantages.amax(dim=1) == advantages.amin(dim=1)


def replace_uniform_groups(rollout: Rollout, fresh: Rollout, pad_id: int) -> Rollout:
    """`rollout` with its uniform groups replaced by those of `fresh` that are not, as far as these go."""
    slots = find_uniform_groups(rollout.advantages).nonzero().flatten().tolist()
    picks = (~find_uniform_groups(fresh.advantages)).nonzero().flatten().tolist()
    order = list(range(len(rollout)))
    for slot, pick in zip(slots, picks, strict=False):
        order[slot] = len(rollout) + pick
    return join(rollout, fresh, pad_id).select(order)


def join(first: Rollout, second: Rollout, pad_id: int) -> Rollout:
    """The questions of both, padded to the longer completions, prompts and clips."""
    tensors = {
        name: _join(tensor, getattr(second, name), pad_id if name == "ids" else 0)
        for name, tensor in vars(first).items()
        if isinstance(tensor, torch.Tensor)
    }
    a, b = first.questions, second.questions
    questions = Batch(
        _join(a.input_ids, b.input_ids, pad_id, left=True),
        _join(a.attention_mask, b.attention_mask, left=True),
        _join(a.input_features, b.input_features),
        a.frames + b.frames,
        a.encoded,
        a.waves + b.waves,
    )
    return replace(first, rows=first.rows + second.rows, questions=questions, **tensors)


def _join(first: torch.Tensor, second: torch.Tensor, value: int = 0, left: bool = False) -> torch.Tensor:
    longest = max(first.shape[-1], second.shape[-1])
    missing = [(tensor, longest - tensor.shape[-1]) for tensor in (first, second)]
    return torch.cat([pad(tensor, (count, 0) if left else (0, count), value=value) for tensor, count in missing])
