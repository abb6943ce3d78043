"""A generation batch as one value: questions, completions, rewards, and what the loss needs of them.

Shapes: N questions, G generations, F reward functions, C completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object
from trl.trainer.utils import nanstd, pad

from dataset.encode import Batch


@dataclass
class Rollout:
    """N questions with G completions each."""

    rows: list[dict]  # N, the data set's
    questions: Batch  # N prompts with their clips
    ids: torch.Tensor  # (N, G, C), right-padded
    mask: torch.Tensor  # (N, G, C), 1 at the tokens that are trained on
    lengths: torch.Tensor  # (N, G), tokens of each completion, the end token included
    ended: torch.Tensor  # (N, G), False where the completion was cut off at the length limit
    rewards: torch.Tensor  # (N, G, F), NaN where a function does not apply
    advantages: torch.Tensor  # (N, G)
    old_logps: torch.Tensor | None = None  # (N, G, C), where a later policy learns from the rollout
    ref_logps: torch.Tensor | None = None  # (N, G, C), with a KL term
    importance: torch.Tensor | None = None  # (N, G, C) or (N, G, 1), corrects for another engine's sampling
    mean_tokens: torch.Tensor | None = None  # tokens of a micro-batch, mean over the generation batch of all processes

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, questions: Sequence[int]) -> "Rollout":
        """The rollout of some of the questions, in this order."""
        index = torch.as_tensor(questions, dtype=torch.long, device=self.ids.device)
        tensors = {name: value[index] for name, value in vars(self).items() if torch.is_tensor(value) and value.ndim}
        kept = list(questions)
        return replace(self, rows=[self.rows[i] for i in kept], questions=self.questions.take(kept), **tensors)

    def shuffled(self, parts: int) -> list["Rollout"]:
        """Micro-batches of whole groups in a random order, drawn from torch's global generator."""
        return [self.select(part) for part in torch.randperm(len(self)).view(parts, -1).tolist()]


def group_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, scale: str = "group", aggregation: str = "sum_then_normalize"
) -> torch.Tensor:
    """Advantages (N, G): each completion's reward relative to its group (arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: (N, G, F) of all processes, NaN where a function does not apply. A completion to which none applies
            gets the advantage 0 and does not count in its group's mean.
        weights: (F,).
        scale: divide by the standard deviation of the `group`, of the whole `batch`, or `none` (Dr. GRPO).
        aggregation: `sum_then_normalize`, or `normalize_then_sum`: each function by itself (GDPO, arXiv 2601.05242).
    """
    if aggregation == "normalize_then_sum":
        rewards = (rewards - rewards.nanmean(dim=1, keepdim=True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
        total = total_rewards(rewards, weights)
        return ((total - total.nanmean()) / (nanstd(total) + 1e-4)).nan_to_num(nan=0.0)
    total = total_rewards(rewards, weights)
    advantages = total - total.nanmean(dim=1, keepdim=True)
    if scale != "none":
        deviation = nanstd(total, dim=1, keepdim=True) if scale == "group" else nanstd(total)
        advantages = advantages / (deviation + 1e-4)
    return advantages.nan_to_num(nan=0.0)


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum (N, G) of rewards (N, G, F); NaN where no function applies."""
    return (rewards * weights).nansum(dim=2).masked_fill(rewards.isnan().all(dim=2), torch.nan)


def describe_rollout(
    rewards: torch.Tensor, names: Sequence[str], weights: torch.Tensor, lengths: torch.Tensor, ended: torch.Tensor
) -> dict[str, float]:
    """What to log of a generation batch, under TRL's names (docs/METRICS.md).

    Args:
        rewards: (N, G, F) of all processes, of functions with these `names` and `weights` (F,).
        lengths, ended: (N, G), as in `Rollout`.
    """
    total = total_rewards(rewards, weights)
    metrics = {"reward": total.nanmean(), "reward_std": nanstd(total)}
    deviation = nanstd(total, dim=1)
    metrics |= {"group_reward_std": deviation.nanmean(), "frac_reward_zero_std": (deviation < 1e-8).float().mean()}
    for name, column in zip(names, rewards.unbind(dim=2), strict=True):
        metrics |= {f"rewards/{name}/mean": column.nanmean(), f"rewards/{name}/std": nanstd(column)}
    for kind, values in (("", lengths), ("terminated_", lengths[ended])):
        values = values.float().flatten() if len(values) else torch.zeros(1)
        for name, value in (("mean", values.mean()), ("min", values.min()), ("max", values.max())):
            metrics[f"completions/{name}_{kind}length"] = value
    metrics["completions/clipped_ratio"] = 1 - ended.float().mean()
    return {name: float(value) for name, value in metrics.items()}


def log_completions(trainer, prompts: list[str], texts: list[str], rewards: torch.Tensor, advantages: torch.Tensor):
    """Fill TRL's table of completions, and log what reward functions passed to `log_extra` and `log_metric`. `prompts`
    and `texts` are this process's B; `rewards` (B, F) and `advantages` (N, G) are those of all processes."""
    logs, mode = trainer._logs, "train" if trainer.model.training else "eval"
    logs["prompt"].extend(gather_object(prompts))
    logs["completion"].extend(gather_object(texts))
    logs["advantages"].extend(advantages.flatten().tolist())
    for name, column in zip(trainer.reward_func_names, rewards.T, strict=True):
        logs["rewards"][name].extend(column.tolist())
    pending = gather_object([(dict(trainer._pending_extra_logs), dict(trainer._pending_metrics))])  # of each process
    for name in dict.fromkeys(name for extra, _ in pending for name in extra):
        missing = [None] * len(prompts)
        logs["extra"][name].extend(value for extra, _ in pending for value in extra.get(name, missing))
    for name in dict.fromkeys(name for _, metrics in pending for name in metrics):
        values = [value for _, metrics in pending for value in metrics.get(name, [])]
        trainer._metrics[mode][name].append(sum(values) / len(values))
    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()


def pad_completions(
    completions: list[list[int]], generations: int, pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (N, G, C), right-padded, of N * G completions, question by question."""
    rows = [torch.tensor(tokens) for tokens in completions]
    ids, mask = pad(rows, padding_value=pad_id), pad([torch.ones_like(row) for row in rows], padding_value=0)
    return tuple(tensor.to(device).unflatten(0, (-1, generations)) for tensor in (ids, mask))


def check_whole_groups(flag: str, size: int, generations: int) -> None:
    """Raise a `ValueError` that names a working number where a batch of `size` completions cuts a group in two."""
    if size % generations:
        remedy = f"use {max(size // generations, 1) * generations} or another multiple"
        raise ValueError(f"--{flag} {size} counts completions and must hold whole groups of {generations}: {remedy}")
