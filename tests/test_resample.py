"""Fresh questions replace those whose rewards are all equal, while there are any, on all processes in step."""

import json

import pytest
import torch

from dataset.encode import Batch, count_tokens_of_frames
from run.resample import find_uniform_groups, replace_uniform_groups, resample_uniform_groups
from running import run
from test_grpo_trainer import make_trainer
from trainer.rollout import Rollout


def test_uniform_groups():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [1.0, 1.0, 1.1], [0.0, 2.0, 1.0]])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert find_uniform_groups(advantages).tolist() == [True, True, False, False]


def test_replaced_groups_keep_their_padding_sides():
    def rollout(value, prompt, completion, uniform):
        shape = 2, 3, completion
        return Rollout(
            rows=[{"question": value}] * 2,
            questions=Batch(
                torch.full((2, prompt), value),
                torch.ones(2, prompt, dtype=torch.long),
                torch.full((2, 1, 50 * value), float(value)),
                [40 * value] * 2,
            ),
            ids=torch.full(shape, value),
            mask=torch.ones(shape, dtype=torch.long),
            lengths=torch.full((2, 3), completion),
            ended=torch.ones(2, 3, dtype=torch.bool),
            rewards=torch.zeros(2, 3, 1),
            advantages=value + torch.arange(3.0) * (torch.arange(2) != uniform)[:, None],
            ref_logps=torch.full(shape, -1.0),
        )

    merged = replace_uniform_groups(rollout(1, 4, 2, uniform=1), rollout(2, 2, 5, uniform=0), pad_id=9)
    assert merged.rows == [{"question": 1}, {"question": 2}]
    assert merged.questions.input_ids.tolist() == [[1, 1, 1, 1], [9, 9, 2, 2]]
    assert merged.questions.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert merged.questions.frames == [40, 80] and merged.questions.input_features.shape[:2] == (2, 1)
    assert (merged.questions.input_features[0, 0, :50] == 1).all()
    assert (merged.questions.input_features[1, 0, :80] == 2).all()
    assert merged.ids[:, 0].tolist() == [[1, 1, 9, 9, 9], [2, 2, 2, 2, 2]]
    assert merged.mask[:, 0].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert merged.ref_logps[:, 0].tolist() == [[-1, -1, 0, 0, 0], [-1, -1, -1, -1, -1]]
    assert merged.advantages[:, 0].tolist() == [1.0, 2.0] and merged.lengths[:, 0].tolist() == [2, 5]


def only_some(useful: set[str]):
    """A reward that differs within the groups of some clips only."""

    def reward(completions, audio_path, **kwargs) -> list[float]:
        return [float(i % 2) if path[-5] in useful else 1.0 for i, path in enumerate(audio_path)]

    return reward


@pytest.mark.parametrize(("useful", "rounds", "left"), [("0123", 8, 0), ("3", 8, 0.5), ("", 2, 1), ("01234567", 8, 0)])
def test_uniform_groups_are_replaced_while_fresh_questions_remain(
    small_model, questions, tmp_path, useful, rounds, left
):
    trainer = make_trainer(small_model, questions, tmp_path, rewards=[only_some(set(useful))], logging_steps=1)
    resample_uniform_groups(trainer, rounds)
    trainer.model.train()
    rollout = trainer.roll_out([trainer.train_dataset[4], trainer.train_dataset[5]])
    assert find_uniform_groups(rollout.advantages).float().mean() == left
    trainer.log({})
    logged = trainer.state.log_history[-1]
    assert logged["groups/uniform_share"] == (0.0 if useful == "01234567" else 1.0)
    assert logged["groups/uniform_share_left"] == left
    assert (logged["groups/resample_rounds"] > 0) == (useful != "01234567")
    assert len({row["audio_path"] for row in rollout.rows}) == 2, "a question is drawn twice"
    # A prompt belongs to its clip: it has as many audio tokens as the clip.
    for row, prompt, frames in zip(rollout.rows, rollout.questions.input_ids, rollout.questions.frames, strict=True):
        tokens = int((prompt == trainer.model.config.audio_token_id).sum())
        _, own = trainer.load([row])
        assert frames == own.frames[0] and tokens == count_tokens_of_frames(frames)
    trainer.current_gradient_accumulation_steps = 1
    assert torch.isfinite(trainer.compute_loss(trainer.model, rollout))


def test_rollouts_of_one_step_draw_different_questions(small_model, questions, tmp_path):
    """The order of fresh questions depends on the rollout, not only on the step."""
    trainer = make_trainer(
        small_model, questions, tmp_path, rewards=[only_some(set())], gradient_accumulation_steps=8, max_steps=1,
        per_device_train_batch_size=4, steps_per_generation=1,
    )  # fmt: skip
    drawn: list[list[str]] = []
    load = trainer.load

    def watch(rows):
        drawn.append([row["audio_path"] for row in rows])
        return load(rows)

    trainer.load = watch
    resample_uniform_groups(trainer, rounds=1)
    trainer.train()
    fresh = drawn[1::2]  # each rollout loads its own questions first
    assert len(fresh) == 8 and len({*map(tuple, fresh)}) > 2


@pytest.mark.slow
def test_two_processes_stay_in_step(small_model, questions, tmp_path):
    """The processes take the same number of rounds, whichever finds an advantage first."""
    (tmp_path / "rewards.py").write_text(
        "def some(completions, audio_path, **kwargs):\n"
        "    return [float(i % 2) if path[-5] in '1357' else 0.0 for i, path in enumerate(audio_path)]\n"
    )
    run(
        "sh", "run_grpo.sh", "--use_cpu", "true", "--max_steps", "3", "--questions_per_step", "4", "--num_generations", "2",
        "--max_completion_length", "4", "--save_strategy", "no", "--resample_uniform_groups", "true", "--beta", "0",
        "--max_resample_rounds", "8", "--reward_funcs", f"{tmp_path}/rewards.py:some",
        MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=tmp_path / "out", GPU_NUM=2,
    )  # fmt: skip
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()][:3]
    assert max(entry["groups/uniform_share"] for entry in logged) > 0
    # Each process has two useful questions at least among its half of the eight.
    assert max(entry["groups/uniform_share_left"] for entry in logged) <= 0.5
