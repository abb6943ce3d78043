"""The GRPO loss and its variants, as functions of tensors (N, G, C).

The loss of a micro-batch is a weighted sum over completion tokens t:

    loss = sum_t  w_t * (policy_t + beta * kl_t)

    ratio_t = exp(log pi(t) - log pi_old(t))              importance ratio; see `importance_ratio`
    A       = advantage of the completion                 `rollout.group_advantages`
    kl_t    = exp(d) - d - 1,  d = log pi_ref(t) - log pi(t)      k3 estimate; GRPO, arXiv 2402.03300, eq. (4)

`--loss_type` names a policy term and the weights w_t of the tokens:

    name     policy term  weight of a token                         source
    grpo     clipped      1 / (N G |completion|)                    DeepSeekMath, arXiv 2402.03300, eq. (3)
    bnpo     clipped      1 / tokens of the micro-batch             TRL
    dr_grpo  clipped      1 / (N G max_completion_length)           Dr. GRPO, arXiv 2503.20783
    dapo     clipped      1 / tokens of a micro-batch, step's mean  DAPO, arXiv 2503.14476, eq. (8)
    cispo    cispo        as dapo                                   MiniMax-M1, arXiv 2506.13585, eq. (4)

To add a loss, write a policy term or a weighting in the same form and name the pair in `LOSSES`.
Shapes: N questions, G generations, C completion tokens.
"""

from collections.abc import Callable

import torch

from .rollout import Rollout


def clipped(ratio: torch.Tensor, advantages: torch.Tensor, logps: torch.Tensor, args) -> torch.Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), PPO's surrogate (arXiv 1707.06347, eq. 7). `delta` also
    bounds the unclipped ratio from above (INTELLECT-2, arXiv 2505.07291)."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    bounded = ratio.clamp(1 - args.epsilon, 1 + high)
    unclipped = ratio if args.delta is None else ratio.clamp(max=args.delta)
    return -torch.min(unclipped * advantages, bounded * advantages)


def cispo(ratio: torch.Tensor, advantages: torch.Tensor, logps: torch.Tensor, args) -> torch.Tensor:
    """-stop_gradient(min(r, epsilon_high)) A log pi."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return -ratio.clamp(max=high).detach() * advantages * logps


def mean_of_completions(rollout: Rollout, args) -> torch.Tensor:
    """Every completion counts the same, whatever its length."""
    return rollout.mask / (rollout.mask.sum(dim=2, keepdim=True).clamp(min=1) * rollout.mask[..., 0].numel())


def mean_of_tokens(rollout: Rollout, args) -> torch.Tensor:
    """Every token of the micro-batch counts the same."""
    return rollout.mask / rollout.mask.sum().clamp(min=1)


def mean_of_step_tokens(rollout: Rollout, args) -> torch.Tensor:
    """Every token of the optimizer step counts the same, in whichever micro-batch and process it is."""
    assert rollout.mean_tokens is not None, "set once a whole generation batch is sampled"
    return rollout.mask / rollout.mean_tokens


def constant_length(rollout: Rollout, args) -> torch.Tensor:
    """Every completion counts as if it had the maximum length: no bias towards short ones."""
    return rollout.mask / (rollout.mask[..., 0].numel() * args.max_completion_length)


LOSSES: dict[str, tuple[Callable, Callable]] = {  # policy term and weight of each token, both (N, G, C)
    "grpo": (clipped, mean_of_completions),
    "bnpo": (clipped, mean_of_tokens),
    "dr_grpo": (clipped, constant_length),
    "dapo": (clipped, mean_of_step_tokens),
    "cispo": (cispo, mean_of_step_tokens),
}
# Settings of `GRPOConfig` that change TRL's loss and are not implemented here, with the value that leaves them off.
NOT_IMPLEMENTED = {
    "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False, "off_policy_mask_threshold": None,
}  # fmt: skip


def check_loss(args) -> None:
    """Raise a `ValueError` that names a loss, or a setting of one, which is not implemented."""
    if args.loss_type not in LOSSES:
        raise ValueError(f"--loss_type {args.loss_type} is not implemented; use one of {', '.join(LOSSES)}")
    if args.importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"--importance_sampling_level {args.importance_sampling_level}: use token or sequence")
    for name, off in NOT_IMPLEMENTED.items():
        if (value := getattr(args, name)) != off:
            raise ValueError(f"--{name} {value} is not implemented; omit it")


def importance_ratio(logps: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, level: str) -> torch.Tensor:
    """pi / pi_old of each token, (N, G, C); with `level` "sequence" the geometric mean over the completion, (N, G, 1)
    (GSPO, arXiv 2507.18071, eq. 7)."""
    log_ratio = logps - old
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(dim=2, keepdim=True) / mask.sum(dim=2, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def token_weights(rollout: Rollout, args) -> torch.Tensor:
    """The weight of each token in the loss, (N, G, C), 0 at padding."""
    return LOSSES[args.loss_type][1](rollout, args)


def groups_with_gradient(rollout: Rollout, beta: float) -> list[int]:
    """Indices of the groups that change the gradient: without a KL term only those with an advantage that is not 0. One
    group stays in any case: engines synchronise in forward and backward passes, so every process needs one."""
    if beta:
        return list(range(len(rollout)))
    return (rollout.advantages != 0).any(dim=1).nonzero()[:, 0].tolist() or [0]


def grpo_loss(
    logps: torch.Tensor, rollout: Rollout, weights: torch.Tensor, args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch, before it is divided by the number of accumulated ones, and what to log of each token,
    (N, G, C) or (N, G, 1).

    Args:
        logps: log-probs (N, G, C) of the completions under the policy, in nats.
        rollout: the micro-batch. Without `old_logps` the policy is the one that sampled it: every ratio is 1.
        weights: of `token_weights`, (N, G, C); computed before groups without a gradient are dropped.
    """
    old = logps.detach() if rollout.old_logps is None else rollout.old_logps
    ratio = importance_ratio(logps, old, rollout.mask, args.importance_sampling_level)
    advantages = rollout.advantages[..., None]  # (N, G, 1)
    loss = LOSSES[args.loss_type][0](ratio, advantages, logps, args)
    if rollout.importance is not None:
        loss = loss * rollout.importance
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    too_low, too_high = (ratio < 1 - args.epsilon) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    logged = {"clip_ratio/low_mean": too_low, "clip_ratio/high_mean": too_high}
    logged["clip_ratio/region_mean"] = too_low | too_high
    if args.loss_type == "cispo":
        logged = {"cispo_clip_ratio": (ratio > high) & (advantages > 0)}
    if args.beta:
        difference = rollout.ref_logps - logps
        kl = difference.exp() - difference - 1
        if args.use_bias_correction_kl:  # DeepSeek-V3.2, arXiv 2512.02556
            kl = kl * ratio
        loss, logged = loss + args.beta * kl, logged | {"kl": kl.detach()}
    return (loss * weights).sum(), logged
