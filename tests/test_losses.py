"""The losses that came after the paper, by TRL's flags and on the shared prompt, each against a slow per-token loop."""

import pytest
import torch

import row_by_row
from test_grpo_trainer import first_rows, make_trainer

VARIANTS = {
    "paper": dict(),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none"),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28),
    "bnpo": dict(loss_type="bnpo"),
    "unscaled": dict(scale_rewards="none"),
    "sequence": dict(importance_sampling_level="sequence"),
    "weighted": dict(reward_weights=[2.0, 0.5, 3.0]),
    "no reference": dict(beta=0.0),
    "another temperature": dict(temperature=0.5),
}


def slow_loss(trainer, policy, old, reference, mask, rewards) -> float:
    """The loss of N groups, completion by completion and token by token.

    Args:
        policy, old, reference, mask: (N, G, C).
        rewards: (N, G), weighted and summed.
    """
    args, total, tokens = trainer.args, 0.0, 0
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
                loss = -min(ratio * advantage, ratio.clamp(1 - args.epsilon, 1 + high) * advantage)
                if args.beta:
                    difference = reference[n, g, t] - policy[n, g, t]
                    loss = loss + args.beta * (difference.exp() - difference - 1)
                per_token.append(loss)
            if args.loss_type == "grpo":  # mean over the completion, then over completions
                total += sum(per_token) / length / (questions * generations)
            elif args.loss_type == "dr_grpo":  # over a constant length
                total += sum(per_token) / (questions * generations * args.max_completion_length)
            else:  # bnpo, dapo: over all tokens
                total += sum(per_token)
                tokens += length
    return float(total / tokens if tokens else total)


@pytest.mark.parametrize("name", VARIANTS)
def test_against_a_per_token_loop(small_model, questions, tmp_path, name):
    settings = dict(num_iterations=2, gradient_accumulation_steps=1, beta=0.1) | VARIANTS[name]
    trainer = make_trainer(small_model, questions, tmp_path, **settings)
    assert (trainer.ref_model is None) == (settings["beta"] == 0), "a reference that nothing is compared with"
    if trainer.ref_model is not None:
        for parameter in trainer.ref_model.parameters():
            parameter.data.mul_(1.05)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(first_rows(trainer, 2, 4))
    assert "old_per_token_logps" in batch, "a second iteration needs the log-probs of the first"
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    scored = row_by_row.as_inputs(trainer._questions), ids, mask, trainer.args.temperature
    with torch.no_grad():
        old = row_by_row.log_probs(trainer.model, *scored)
        reference = row_by_row.log_probs(trainer.ref_model, *scored) if trainer.ref_model else None
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.model.parameters():  # a step away from the rollout, for ratios beyond the clip
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        policy = row_by_row.log_probs(trainer.model, *scored)
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer._compute_loss(trainer.model, dict(batch))
    ratios = (policy - old).exp()[mask.bool()]
    assert (ratios > 1.2).any() and (ratios < 0.8).any(), "nothing would be clipped"

    texts = trainer.processing_class.batch_decode(ids.flatten(0, 1), skip_special_tokens=True)
    rows = first_rows(trainer, 2, 4)
    columns = {key: [row[key] for row in rows] for key in ("solution", "style")}
    weights = trainer.args.reward_weights or [1.0] * 3
    rewards = sum(
        weight * torch.tensor(reward(completions=texts, **columns))
        for weight, reward in zip(weights, trainer.reward_funcs, strict=True)
    ).view(2, 4)
    expected = slow_loss(trainer, policy, old, reference, mask, rewards)
    assert loss.item() == pytest.approx(expected, abs=2e-5, rel=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_iterations_train(small_model, questions, tmp_path, name):
    settings = dict(num_iterations=2, gradient_accumulation_steps=2, per_device_train_batch_size=4) | VARIANTS[name]
    trainer = make_trainer(small_model, questions, tmp_path, max_steps=2, save_strategy="no", **settings)
    trainer.train()
    assert all(step["grad_norm"] > 0 for step in trainer.state.log_history[:2])
