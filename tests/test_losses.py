"""The loss of a step on the shared prompt equals a slow loop over completions and tokens, for each loss."""

import pytest
import torch

import row_by_row
from test_grpo_trainer import first_rows, make_trainer, roll_out

VARIANTS = {
    "paper": dict(),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none"),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28),
    "cispo": dict(loss_type="cispo", epsilon_high=1.1),
    "bnpo": dict(loss_type="bnpo"),
    "unscaled": dict(scale_rewards="none"),
    "sequence": dict(importance_sampling_level="sequence"),
    "weighted": dict(reward_weights=[2.0, 0.5, 3.0]),
    "no reference": dict(beta=0.0),
    "another temperature": dict(temperature=0.5),
}


def slow_loss(args, policy, old, reference, mask, rewards) -> float:
    """The loss of N groups, completion by completion and token by token.

    Args:
        policy, old, reference, mask: (N, G, C).
        rewards: (N, G), weighted and summed.
    """
    total, tokens = 0.0, 0
    questions, generations, _ = policy.shape
    for n in range(questions):
        for g in range(generations):
            advantage = rewards[n, g] - rewards[n].mean()
            if args.scale_rewards == "group":
                advantage = advantage / (rewards[n].std() + 1e-4)
            length = int(mask[n, g].sum())
            log_ratios = [policy[n, g, t] - old[n, g, t] for t in range(length)]
            if args.importance_sampling_level == "sequence":
                log_ratios = [sum(log_ratios) / length] * length
            per_token = []
            for t in range(length):
                ratio = log_ratios[t].exp()
                high = args.epsilon if args.epsilon_high is None else args.epsilon_high
                if args.loss_type == "cispo":
                    loss = -ratio.clamp(max=high) * advantage * policy[n, g, t]
                else:
                    loss = -min(ratio * advantage, ratio.clamp(1 - args.epsilon, 1 + high) * advantage)
                if args.beta:
                    difference = reference[n, g, t] - policy[n, g, t]
                    loss = loss + args.beta * (difference.exp() - difference - 1)
                per_token.append(loss)
            if args.loss_type == "grpo":  # mean over the completion, then over completions
                total += sum(per_token) / length / (questions * generations)
            elif args.loss_type == "dr_grpo":  # over a constant length
                total += sum(per_token) / (questions * generations * args.max_completion_length)
            else:  # bnpo, dapo, cispo: mean over all tokens
                total += sum(per_token)
                tokens += length
    return float(total / tokens if tokens else total)


@pytest.mark.parametrize("name", VARIANTS)
def test_against_a_per_token_loop(small_model, questions, tmp_path, name):
    settings = dict(num_iterations=2, gradient_accumulation_steps=1, beta=0.1) | VARIANTS[name]
    trainer = make_trainer(small_model, questions, tmp_path, **settings)
    if trainer.ref_model is not None:
        for parameter in trainer.ref_model.parameters():
            parameter.data.mul_(1.05)
    rollout = roll_out(trainer, 2)
    rollout.mean_tokens = rollout.mask.sum()
    scored = row_by_row.as_inputs(rollout.questions), rollout.ids, rollout.mask, trainer.args.temperature
    with torch.no_grad():
        old = row_by_row.log_probs(trainer.model, *scored)
        reference = row_by_row.log_probs(trainer.ref_model, *scored) if settings["beta"] else None
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.model.parameters():  # a step away from the rollout, for ratios beyond the clip
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        policy = row_by_row.log_probs(trainer.model, *scored)
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(trainer.model, rollout)
    ratios = (policy - old).exp()[rollout.mask.bool()]
    assert (ratios > 1.2).any() and (ratios < 0.8).any(), "no ratio is clipped"

    texts = trainer.processing_class.batch_decode(rollout.ids.flatten(0, 1), skip_special_tokens=True)
    rows = [row for row in first_rows(trainer, 2) for _ in range(4)]
    columns = {key: [row[key] for row in rows] for key in ("solution", "style")}
    weights = trainer.args.reward_weights or [1.0] * 3
    rewards = sum(
        weight * torch.tensor(reward(completions=texts, **columns))
        for weight, reward in zip(weights, trainer.reward_funcs, strict=True)
    ).view(2, 4)
    expected = slow_loss(trainer.args, policy, old, reference, rollout.mask, rewards)
    assert loss.item() == pytest.approx(expected, abs=2e-5, rel=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_iterations_train(small_model, questions, tmp_path, name):
    settings = dict(num_iterations=2, gradient_accumulation_steps=2, per_device_train_batch_size=4) | VARIANTS[name]
    trainer = make_trainer(small_model, questions, tmp_path, max_steps=2, save_strategy="no", **settings)
    trainer.train()
    assert all(step["grad_norm"] > 0 for step in trainer.state.log_history[:2])
