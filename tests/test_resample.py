"""Questions without an advantage are replaced by fresh ones, while there are any, on all processes in step."""

import json

import pytest
import torch

from running import run
from test_grpo_trainer import first_rows, make_trainer
from trainer.resample import find_uniform_groups, replace_uniform_groups


def test_uniform_groups():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [1.0, 1.0, 1.1], [0.0, 2.0, 1.0]])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert find_uniform_groups(advantages).tolist() == [True, True, False, False]


def test_replaced_groups_keep_their_padding_sides():
    def batch(value, prompt, completion, uniform):
        return {
            "prompt_ids": torch.full((2, 3, prompt), value),
            "prompt_mask": torch.ones(2, 3, prompt, dtype=torch.long),
            "completion_ids": torch.full((2, 3, completion), value),
            "completion_mask": torch.ones(2, 3, completion, dtype=torch.long),
            "advantages": torch.full((2, 3), float(value)) + torch.arange(3) * (torch.arange(2) != uniform)[:, None],
            "frames": [value, value],
            "num_items_in_batch": torch.tensor(value),
        }

    merged = replace_uniform_groups(batch(1, 4, 2, uniform=1), batch(2, 2, 5, uniform=0), pad_id=9)
    assert merged["prompt_ids"][:, 0].tolist() == [[1, 1, 1, 1], [9, 9, 2, 2]]
    assert merged["prompt_mask"][:, 0].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert merged["completion_ids"][:, 0].tolist() == [[1, 1, 9, 9, 9], [2, 2, 2, 2, 2]]
    assert merged["completion_mask"][:, 0].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert merged["advantages"][:, 0].tolist() == [1.0, 2.0] and merged["frames"] == [1, 2]


def only_some(useful: set[str]):
    """A reward that differs within the groups of some clips only."""

    def reward(completions, audio_path, **kwargs) -> list[float]:
        return [float(i % 2) if path[-5] in useful else 1.0 for i, path in enumerate(audio_path)]

    return reward


@pytest.mark.parametrize(("useful", "rounds", "left"), [("0123", 8, 0), ("3", 8, 0.5), ("", 2, 1), ("01234567", 8, 0)])
def test_no_uniform_group_is_left_while_fresh_questions_remain(small_model, questions, tmp_path, useful, rounds, left):
    trainer = make_trainer(small_model, questions, tmp_path)
    trainer.reward_funcs = [only_some(set(useful))] * 3
    trainer.max_resample_rounds = rounds
    trainer.model.train()
    asked = first_rows(trainer, 6, 4)[16:]  # clips 4 and 5
    batch = trainer._generate_and_score_completions(asked)
    assert find_uniform_groups(batch["advantages"]).float().mean() == left
    metrics = trainer._metrics["train"]
    assert metrics["groups/uniform_share"] == [0.0 if useful == "01234567" else 1.0]
    assert metrics["groups/uniform_share_left"] == [left]
    assert (metrics["groups/resample_rounds"][0] > 0) == (useful != "01234567")
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert len(batch["input_features"].flatten(1).unique(dim=0)) == 2, "the same question was drawn twice"
    # Each group still belongs to its clip: the audio tokens of its prompt are as many as its clip makes.
    for prompt, frames in zip(batch["prompt_ids"][:, 0], batch["frames"], strict=True):
        assert (prompt == trainer.model.config.audio_token_id).sum() == ((frames - 1) // 2 + 1 - 2) // 2 + 1
    trainer.current_gradient_accumulation_steps = 1
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


def test_training_with_resampling_logs_the_shares(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, max_steps=2, gradient_accumulation_steps=2)
    trainer.max_resample_rounds = 2
    trainer.train()
    for key in ("groups/uniform_share", "groups/uniform_share_left", "groups/resample_rounds"):
        assert key in trainer.state.log_history[0]


@pytest.mark.slow
def test_two_processes_stay_in_step(preloaded, small_model, questions, tmp_path):
    """One process finds a group with an advantage sooner than the other, or neither does: no one waits for ever."""
    (tmp_path / "rewards.py").write_text(
        "def some(completions, audio_path, **kwargs):\n"
        "    return [float(i % 2) if path[-5] in '1357' else 0.0 for i, path in enumerate(audio_path)]\n"
    )
    run(
        "sh", "run_grpo.sh", "--use_cpu", "true", "--max_steps", "3", "--questions_per_step", "4", "--num_generations", "2",
        "--max_completion_length", "4", "--save_strategy", "no", "--resample_uniform_groups", "true", "--beta", "0",
        "--max_resample_rounds", "8", "--reward_funcs", f"{tmp_path}/rewards.py:some",
        MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=tmp_path / "out", GPU_NUM=2, PRELOADED=preloaded,
    )  # fmt: skip
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()][:3]
    assert max(entry["groups/uniform_share"] for entry in logged) > 0
    assert (
        max(entry["groups/uniform_share_left"] for entry in logged) <= 0.5
    )  # each process has two useful questions at least among its half of the eight
