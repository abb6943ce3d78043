"""`trainer/loss.py` and `group_advantages` equal TRL's own methods, which run on the same tensors here.

Shapes: N questions, G generations, C completion tokens, F reward functions.
"""

from collections import defaultdict
from copy import copy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from dataset.encode import Batch
from run.vllm import correct
from trainer.loss import LOSSES, NOT_IMPLEMENTED, check_loss, groups_with_gradient, grpo_loss, token_weights
from trainer.rollout import Rollout, group_advantages

N, G, C, ACCUMULATED = 3, 4, 6, 2
KL = {"no KL": (0.0, False), "KL": (0.3, False), "corrected KL": (0.3, True)}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> GRPOConfig:
    return GRPOConfig(
        str(tmp_path_factory.mktemp("out")), num_generations=G, per_device_train_batch_size=N * G, bf16=False,
        use_cpu=True, report_to="none", gradient_accumulation_steps=ACCUMULATED, max_completion_length=2 * C,
    )  # fmt: skip


def with_settings(config: GRPOConfig, **settings) -> GRPOConfig:
    changed = copy(config)
    for name, value in settings.items():
        assert hasattr(config, name)
        setattr(changed, name, value)
    return changed


def make_rollout(masked: bool = False, old: bool = True, importance: str = "none") -> tuple[Rollout, torch.Tensor]:
    """A rollout and the policy's log-probs (N, G, C), as far from the old ones as several steps bring them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, C + 1, (N, G), generator=generator)
    mask = (torch.arange(C) < lengths[..., None]).long()
    if masked:
        mask[0, 1] = 0
    logps = -draw(N, G, C).abs() * mask
    advantages = draw(N, G)
    advantages[1] = 0
    weights = {"none": None, "token": draw(N, G, C).exp(), "sequence": draw(N, G, 1).exp()}
    rollout = Rollout(
        rows=[{} for _ in range(N)],
        questions=Batch(torch.ones(N, 2), torch.ones(N, 2), torch.zeros(N, 1, 8), [8] * N),
        ids=torch.ones(N, G, C, dtype=torch.long),
        mask=mask,
        lengths=lengths,
        ended=torch.ones(N, G, dtype=torch.bool),
        rewards=torch.zeros(N, G, 1),
        advantages=advantages,
        old_logps=(logps + 0.5 * draw(N, G, C)) * mask if old else None,
        ref_logps=(logps + 0.5 * draw(N, G, C)) * mask,
        importance=weights[importance],
        mean_tokens=torch.tensor(50.0 / ACCUMULATED),  # of 50 in the generation batch
    )
    return rollout, logps.requires_grad_()


def own_loss(logps: torch.Tensor, rollout: Rollout, args: GRPOConfig) -> torch.Tensor:
    loss, _ = grpo_loss(logps, rollout, token_weights(rollout, args), args)
    return loss / ACCUMULATED


def trl_loss(logps: torch.Tensor, rollout: Rollout, args: GRPOConfig) -> torch.Tensor:
    """TRL's loss of the same log-probs, on an object with what its method reads."""
    self = stand_in(args) | {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            logps.flatten(0, 1), torch.zeros(N * G, C, dtype=logps.dtype), None,
        ),
        "use_vllm": rollout.importance is not None,
    }  # fmt: skip
    inputs = {
        "prompt_ids": torch.ones(N * G, 2, dtype=torch.long),
        "prompt_mask": torch.ones(N * G, 2, dtype=torch.long),
        "completion_ids": rollout.ids.flatten(0, 1),
        "completion_mask": rollout.mask.flatten(0, 1),
        "advantages": rollout.advantages.flatten(),
        "ref_per_token_logps": rollout.ref_logps.flatten(0, 1),
        "num_items_in_batch": rollout.mean_tokens * args.steps_per_generation,
    }
    for name, value in {
        "old_per_token_logps": rollout.old_logps,
        "importance_sampling_ratio": rollout.importance,
    }.items():
        if value is not None:
            inputs[name] = value.flatten(0, 1)
    return GRPOTrainer._compute_loss(SimpleNamespace(**self), None, inputs)


def stand_in(args: GRPOConfig) -> dict:
    """What TRL's methods read of a trainer on one process."""
    accelerator = SimpleNamespace(
        num_processes=1, process_index=0, sync_gradients=True, device=torch.device("cpu"),
        gather=lambda value: value, reduce=lambda value, reduction: value,
    )  # fmt: skip
    names = (
        "loss_type", "importance_sampling_level", "beta", "max_completion_length", "top_entropy_quantile",
        "off_policy_mask_threshold", "use_adaptive_entropy", "vllm_importance_sampling_correction", "scale_rewards",
        "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max",
        "multi_objective_aggregation", "mask_truncated_completions", "num_iterations",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names} | {
        "args": args,
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "epsilon_low": args.epsilon,
        "epsilon_high": args.epsilon if args.epsilon_high is None else args.epsilon_high,
        "current_gradient_accumulation_steps": ACCUMULATED,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }


def value_and_gradient(loss, logps: torch.Tensor, *args) -> tuple[torch.Tensor, torch.Tensor]:
    value = loss(logps, *args)
    return value.detach(), torch.autograd.grad(value, logps)[0]


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_value_and_gradient_equal_trls(config, loss_type, level, kl):
    beta, corrected = KL[kl]
    fixed = dict(loss_type=loss_type, importance_sampling_level=level, beta=beta, use_bias_correction_kl=corrected)
    values = set()
    for high, delta, *sampled in product(
        (None, 0.28), (None, 1.3), (False, True), (True, False), ("none", "token", "sequence")
    ):
        args = with_settings(config, epsilon_high=high, delta=delta, **fixed)
        rollout, logps = make_rollout(*sampled)
        found, expected = (value_and_gradient(loss, logps, rollout, args) for loss in (own_loss, trl_loss))
        for own, trl in zip(found, expected, strict=True):
            torch.testing.assert_close(own, trl, atol=1e-6, rtol=1e-6, msg=f"{high=} {delta=} {sampled=}")
        values.add(round(float(found[0]), 6))
    assert len(values) > 4, "the settings change nothing"


@pytest.mark.parametrize("importance", ["none", "token"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_groups_without_advantage_are_dropped_without_a_change(config, loss_type, importance):
    args = with_settings(config, loss_type=loss_type, beta=0.0)
    rollout, logps = make_rollout(importance=importance)
    kept = groups_with_gradient(rollout, beta=0.0)
    assert kept == [0, 2] and groups_with_gradient(rollout, beta=0.1) == [0, 1, 2]

    def loss_of_kept(logps: torch.Tensor) -> torch.Tensor:
        loss, _ = grpo_loss(logps[kept], rollout.select(kept), token_weights(rollout, args)[kept], args)
        return loss / ACCUMULATED

    expected = value_and_gradient(own_loss, logps, rollout, args)
    for own, whole in zip(value_and_gradient(loss_of_kept, logps), expected, strict=True):
        torch.testing.assert_close(own, whole, atol=1e-12, rtol=1e-12)


def test_a_group_is_kept_where_none_has_an_advantage():
    rollout, _ = make_rollout()
    rollout.advantages.zero_()
    assert len(groups_with_gradient(rollout, beta=0.0)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_type", "sapo"), ("importance_sampling_level", "word"), ("top_entropy_quantile", 0.2)]
    + [(name, 0.5 if off in (None, 0.0) else True) for name, off in NOT_IMPLEMENTED.items() if off != 1.0],
)
def test_what_is_not_implemented_is_refused_by_name(config, name, value):
    check_loss(config)
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        check_loss(with_settings(config, **{name: value}))


def trl_rollout(args: GRPOConfig, rewards: torch.Tensor, weights: torch.Tensor, **more) -> dict:
    """What TRL makes of completions of two tokens with these rewards (N, G, F)."""
    completions = [[5, 6]] * rewards[..., 0].numel()
    self = stand_in(args) | {
        "environment_factories": None, "environments": None, "tools": None, "use_vllm": False, "ref_model": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0), "pad_to_multiple_of": None, "eos_token_ids": [6],
        "num_generations": rewards.shape[1], "reward_weights": weights, "reward_funcs": [None] * len(weights),
        "reward_func_names": [str(i) for i in range(len(weights))], "beta": 0.0,
        "_calculate_rewards": lambda *_: rewards.flatten(0, 1), "_pending_extra_logs": {}, "_pending_metrics": {},
        "_logs": {"rewards": defaultdict(list), "extra": defaultdict(list)} | {
            name: [] for name in ("prompt", "completion", "advantages")
        },
        "_generate": lambda prompts: (completions, completions, None, completions, None, {}, None, None),
    } | more  # fmt: skip
    rows = [{"prompt": "?"} for _ in completions]
    return GRPOTrainer._generate_and_score_completions(SimpleNamespace(**self), rows)


REWARDS = {
    "two functions": [[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[0.0, 0.5], [0.0, 0.0], [1.0, 0.0]]],
    "equal": [[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]],
    "a function that does not apply": [[[1.0, torch.nan], [0.0, 1.0], [0.5, torch.nan]], [[torch.nan, 0.5]] * 3],
    "a completion to which none applies": [[[torch.nan] * 2, [0.0, 1.0], [1.0, 1.0]], [[torch.nan] * 2] * 3],
}


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(
    ("scale", "aggregation"),
    [*product(("group", "batch", "none"), ("sum_then_normalize",)), ("group", "normalize_then_sum")],
)
def test_advantages_equal_trls(config, name, scale, aggregation):
    rewards, weights = torch.tensor(REWARDS[name]), torch.tensor([2.0, 0.5])
    args = with_settings(config, scale_rewards=scale, multi_objective_aggregation=aggregation)
    expected = trl_rollout(args, rewards, weights)["advantages"].view(2, 3)
    found = group_advantages(rewards, weights, scale, aggregation)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert found.any() and found.isfinite().all()


def test_a_single_completion_has_no_advantage(config):
    """As in TRL's evaluation with `num_generations_eval` 1."""
    rewards = torch.tensor([[[1.0]], [[0.0]]])
    expected = trl_rollout(config, rewards, torch.ones(1))["advantages"].view(2, 1)
    torch.testing.assert_close(group_advantages(rewards, torch.ones(1)), expected)


@pytest.mark.parametrize(("low", "high"), [(None, 3.0), (0.8, 1.2)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights_equal_trls(config, mode, low, high):
    """The correction for completions that another engine sampled, with a log-prob that the engine could not give."""
    rollout, old = make_rollout()
    rollout = rollout.select([0])
    rollout.mask, rollout.ids = torch.ones(1, G, 2, dtype=torch.long), torch.full((1, G, 2), 5)
    rollout.old_logps = old[:1, :, :2].detach().float()
    sampled = rollout.old_logps + torch.linspace(-1, 1, 2 * G).view(1, G, 2)
    sampled[0, 0, 0] = torch.nan
    args = with_settings(
        config, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )  # fmt: skip
    completions = [[5, 6]] * G
    expected = trl_rollout(
        args, torch.zeros(1, G, 1), torch.ones(1), use_vllm=True,
        _generate=lambda prompts: (completions, completions, None, completions, sampled[0].tolist(), {}, None, None),
        _get_per_token_logps_and_entropies=lambda *_, **__: (rollout.old_logps[0], None, None),
    )["importance_sampling_ratio"]  # fmt: skip
    trainer = SimpleNamespace(args=args, _metrics=defaultdict(lambda: defaultdict(list)))
    torch.testing.assert_close(correct(trainer, rollout, sampled).importance[0], expected)
    assert (expected != 1).any()
