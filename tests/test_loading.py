"""Clips that the loader's processes decode ahead: the same run as without them, each decoded once."""

import multiprocessing
import os
import signal
import subprocess
import sys

import psutil
import pytest

import startup
from conftest import ROOT
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
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="DataError: 11 clips in a row"):
        trainer.train()
    assert not set(multiprocessing.active_children()) - before, "the traceback keeps the loader, but not its process"


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


@pytest.mark.parametrize("what, error", [("mistake", RuntimeError), ("killed", SystemExit)])
def test_a_process_that_is_gone_is_told_from_a_mistake_in_one(
    small_model, questions, tmp_path, monkeypatch, what, error
):
    """The first, by the kernel for its memory, ends the run with a sentence; the second keeps its traceback."""

    def load(*args):
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("a mistake")

    monkeypatch.setattr(loading, "load_or_replace", load)
    trainer = make_trainer(small_model, questions, tmp_path, dataloader_num_workers=1, **STEPS)
    trainer.args.probe_memory, trainer.args.overwrite_output_dir = False, False
    expected = {"mistake": "a mistake", "killed": "a process that decodes clips ahead is gone.*out of memory"}
    with pytest.raises(error, match=expected[what]):
        startup.train(trainer, None)


@pytest.mark.slow  # a process that imports TRL
def test_an_error_that_nobody_foresaw_ends_the_process(tmp_path):
    """Its traceback keeps the loader, whose processes ignore the signal that Python would end them by."""
    (tmp_path / "run.py").write_text(
        "from torch.utils.data import DataLoader\n"
        "from trainer.loading import LoadsAhead\n"
        "class Base:\n"
        "    def _get_dataloader(self):\n"
        "        loader = DataLoader(range(8), num_workers=1)\n"
        "        loader.base_dataloader = loader\n"
        "        return loader\n"
        "class Trainer(LoadsAhead, Base):\n"
        "    pass\n"
        "batches = iter(Trainer()._get_dataloader())\n"
        "next(batches)\n"
        "raise RuntimeError('a kernel failed')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run(
        [sys.executable, tmp_path / "run.py"], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 1 and ended.stderr.endswith("RuntimeError: a kernel failed\n")
