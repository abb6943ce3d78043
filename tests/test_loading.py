"""Clips that the loader's processes decode ahead: the same run as without them, each decoded once."""

import os
import signal

import psutil
import pytest

from dataset.rows import DataError
from test_grpo_trainer import length_reward, make_trainer
from trainer import loading

STEPS = dict(gradient_accumulation_steps=2, num_iterations=2, max_steps=4, per_device_train_batch_size=4)


def train(model, data, out, **settings) -> list[dict]:
    trainer = make_trainer(model, data, out, rewards=[length_reward], **STEPS | settings)
    trainer.train()
    return trainer.state.log_history[:-1]


def test_a_run_is_the_same_wherever_clips_are_decoded(small_model, questions, tmp_path, monkeypatch):
    """Questions, samples, losses and gradients; and a clip is decoded once for all passes over its rollouts."""
    decoded = []

    def load(row, *args):
        decoded.append(row["audio_path"])
        return usual(row, *args)

    usual = loading.load_or_replace
    monkeypatch.setattr(loading, "load_or_replace", load)
    here = train(small_model, questions, tmp_path / "here")
    # Two batches of rollouts of two questions, each for two steps of two passes; one more is begun while they last.
    assert len(decoded) in (4, 6)
    del decoded[:]
    ahead = train(small_model, questions, tmp_path / "ahead", dataloader_num_workers=2)
    assert not decoded
    for one, other in zip(here, ahead, strict=True):
        assert one.pop("data_time") >= 0 and other.pop("data_time") >= 0
        del one["step_time"], other["step_time"]
        assert one == other


def test_what_stands_in_for_a_clip_is_the_same_too(small_model, questions, tmp_path):
    """Half of the clips are gone when the run begins."""
    logs = []
    for workers in (0, 1):
        trainer = make_trainer(
            small_model,
            questions,
            tmp_path / str(workers),
            rewards=[length_reward],
            **STEPS,
            dataloader_num_workers=workers,
        )
        damaged = trainer.train_dataset.map(
            lambda row, number: row | {"audio_path": row["audio_path"] + "x" * (number % 2)}, with_indices=True
        )
        trainer.data_collator.others = trainer.train_dataset = damaged
        trainer.train()
        logs.append(
            [(log["loss"], log["clips/replaced"]) for log in trainer.state.log_history if "clips/replaced" in log]
        )
    assert logs[0] == logs[1] and any(replaced for _, replaced in logs[0])


def test_a_mistake_in_a_loaders_process_is_said_as_elsewhere(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, dataloader_num_workers=1, max_steps=1)
    trainer.data_collator.others = trainer.train_dataset = trainer.train_dataset.map(
        lambda row: row | {"audio_path": "gone"}
    )
    with pytest.raises(DataError, match="DataError: 11 clips in a row"):
        trainer.train()


def test_signals_are_the_trainers_to_answer(small_model, questions, tmp_path):
    """SIGTERM reaches all processes of a group; a loader's goes on, so that the step can be finished and saved."""
    trainer = make_trainer(small_model, questions, tmp_path, dataloader_num_workers=1, **STEPS)
    before = set(psutil.Process().children())
    batches = iter(trainer.get_train_dataloader())
    assert "questions" in next(batches)[0]
    (worker,) = set(psutil.Process().children()) - before
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    loaded = [row["questions"].rows for rows in batches if (row := rows[0]).get("questions")]
    assert loaded
