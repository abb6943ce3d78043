"""Going on: which checkpoint is whole, who may go on from it, and that a run killed anywhere in a save loses nothing."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import DataLoaderShard, prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from trl.trainer.utils import RepeatSampler

from arguments import result_settings
from dataset.dataset import load_train_dataset
from model.checkpoints import IncompleteCheckpoint, check_whole
from running import run, skip_without_compiler
from test_grpo_trainer import length_reward
from train import RecipeConfig, make_parser
from trainer.grpo_trainer import AudioGRPOTrainer, QuestionOrder
from trainer.resume import (
    PARTIAL,
    RECORD,
    check_resumable,
    check_settings,
    checkpoints_in,
    choose_start,
    find_newest,
    finish,
    note_launch,
    remove_checkpoints,
    resume_after_restart,
    step_of,
    strange_checkpoints,
)
from trainer.saving import SelfContainedCheckpoints
from trainer.stopping import RunEnded
from trainer.universal import load_other_parts


def make_trainer(model, data, out, **settings) -> AudioGRPOTrainer:
    """A run of three steps with sampled completions that saves after each; its settings are recorded."""
    defaults = dict(
        use_cpu=True, questions_per_step=2, num_generations=2, max_completion_length=4, learning_rate=1e-2, max_steps=3,
        save_steps=1, seed=3, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    args = RecipeConfig(str(out), **defaults | settings)
    trainer = AudioGRPOTrainer(str(model), [length_reward], args, load_train_dataset(data))
    trainer.run_settings = result_settings([args])
    return trainer


def arguments(out: Path, **settings) -> SimpleNamespace:
    defaults = dict(
        output_dir=str(out), resume=True, resume_from_checkpoint=None, force_resume=False, overwrite_output_dir=False,
        max_steps=3, sync_ref_model=False, save_on_each_node=False,
    )  # fmt: skip
    return SimpleNamespace(**defaults | settings)


@pytest.fixture(scope="module")
def finished(small_model, questions, tmp_path_factory) -> Path:
    """The output of a run of three steps that was not disturbed; its checkpoints all hold their training state."""
    out = tmp_path_factory.mktemp("finished") / "run"
    trainer = make_trainer(small_model, questions, out, keep_optimizer="all")
    trainer.train()
    trainer.save_result()
    return out


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def settings_of(out: Path) -> dict:
    return json.loads((out / "checkpoint-2" / RECORD).read_text())["settings"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "cut off"), ("optimizer.pt", "cut off"), ("scheduler.pt", "missing"),
        ("rng_state.pth", "missing"), ("trainer_state.json", "cut off"), ("tokenizer.json", "missing"),
        ("config.json", "cut off"), (RECORD, "cut off"), (RECORD, "missing"),
    ],
)  # fmt: skip
def test_a_damaged_newest_checkpoint_is_passed_over_by_name(copied, capsys, name, damage):
    assert find_newest(copied) == copied / "checkpoint-3"
    file = copied / "checkpoint-3" / name
    file.write_bytes(file.read_bytes()[:-7]) if damage == "cut off" else file.unlink()
    with pytest.raises(IncompleteCheckpoint, match="checkpoint-3: "):
        check_resumable(copied / "checkpoint-3")
    assert choose_start(arguments(copied), settings_of(copied)) == copied / "checkpoint-2"
    assert "passed over" in capsys.readouterr().out


def test_where_nothing_is_whole_the_reasons_are_named(copied, tmp_path):
    for checkpoint in checkpoints_in(copied):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint to go on from(\n.*optimizer\.pt is missing){3}"):
        find_newest(copied)
    with pytest.raises(ValueError, match="without --resume a new run starts"):
        find_newest(tmp_path / "empty")


def test_a_run_with_other_settings_is_refused_by_their_names(copied):
    start, settings = copied / "checkpoint-3", settings_of(copied)
    check_settings(start, settings)
    other = settings | {"beta": 0.5, "seed": 7, "data_file (content)": "x"}
    with pytest.raises(ValueError) as refused:
        choose_start(arguments(copied), other)
    for part in ("beta 0.04, now 0.5", "seed 3, now 7", "data_file (content) None, now x", "--force_resume true"):
        assert part in str(refused.value)
    assert "questions_per_step" not in str(refused.value)
    assert choose_start(arguments(copied, force_resume=True), other) == start


def test_state_in_other_parts_is_refused_with_what_works(copied):
    """Also by force: DeepSpeed would end in an assertion of its own."""
    record = json.loads((copied / "checkpoint-3" / RECORD).read_text())
    settings = record["settings"] | {"engine": "ZeRO-2 on 2 processes"}
    (copied / "checkpoint-3" / RECORD).write_text(json.dumps(record | {"settings": settings}))
    for now in ("ZeRO-3 on 2 processes", "none"):
        with pytest.raises(ValueError, match=f"that of engine ZeRO-2 on 2 processes, now {now}.* --model_name_or_path"):
            choose_start(arguments(copied, force_resume=True), settings | {"engine": now})
    assert choose_start(arguments(copied), settings) == copied / "checkpoint-3"
    fewer = settings | {"engine": "ZeRO-2 on 1 processes"}
    assert choose_start(arguments(copied), fewer) == copied / "checkpoint-3"
    with pytest.raises(ValueError, match="where all nodes share the disk"):
        choose_start(arguments(copied, save_on_each_node=True), fewer)


def test_state_in_other_parts_without_room_to_be_converted_is_left_as_it_is(copied, monkeypatch):
    checkpoint = copied / "checkpoint-2"
    (checkpoint / "global_step2").mkdir()
    (checkpoint / "latest").write_text("global_step2\n")
    for rank in range(2):
        (checkpoint / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(bytes(5_000_000))
    files = set(filter(Path.is_file, copied.rglob("*")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12_000_000))
    trainer = SimpleNamespace(model_wrapped=None, args=SimpleNamespace(output_dir=str(copied)))
    with pytest.raises(RunEnded, match="it needs 0.02 GB and 0.01 GB are free in .*checkpoint-3: --resume") as ended:
        load_other_parts(trainer, checkpoint)
    assert ended.value.everywhere and set(filter(Path.is_file, copied.rglob("*"))) == files
    assert not any((copied / PARTIAL).iterdir())


def test_a_folder_with_checkpoints_of_another_run_is_refused(copied):
    settings, first = settings_of(copied), str(copied / "checkpoint-1")
    with pytest.raises(ValueError, match="checkpoint-1, checkpoint-2, checkpoint-3, which another run wrote"):
        choose_start(arguments(copied, resume=False), settings)
    with pytest.raises(ValueError, match="checkpoint-2, checkpoint-3, which are later"):
        choose_start(arguments(copied, resume_from_checkpoint=first), settings)
    overwrite = dict(overwrite_output_dir=True)
    assert choose_start(arguments(copied, resume=False, **overwrite), settings) is None
    assert choose_start(arguments(copied, resume_from_checkpoint=first, **overwrite), settings) == Path(first)
    assert len(checkpoints_in(copied)) == 3, "nothing is removed before the data is examined"
    for step in (1, 3):
        (copied / f"test_{step}").mkdir()
    remove_checkpoints(strange_checkpoints(copied, Path(first)))
    assert checkpoints_in(copied) == [Path(first)]
    assert (copied / "test_1").is_dir() and not (copied / "test_3").exists()


def test_a_run_that_the_launcher_starts_again_goes_on_from_its_own_checkpoints_alone(copied, monkeypatch):
    for name, value in (("LAUNCH_ID", "a"), ("TORCHELASTIC_MAX_RESTARTS", "2"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    assert resume_after_restart(copied) == {}, "the first start did not come as far as to train"
    note_launch(copied)
    flags = resume_after_restart(copied)
    assert flags == {"resume": True, "resume_from_checkpoint": None, "overwrite_output_dir": False}
    given = arguments(copied, resume=False, overwrite_output_dir=True)
    vars(given).update(flags)
    assert choose_start(given, settings_of(copied)) == copied / "checkpoint-3"
    monkeypatch.setenv("LAUNCH_ID", "another call of the launcher")
    assert resume_after_restart(copied) == {}
    monkeypatch.setenv("LAUNCH_ID", "a")
    for checkpoint in checkpoints_in(copied):
        (checkpoint / RECORD).unlink()
    assert resume_after_restart(copied) == {"overwrite_output_dir": True}, "it starts over"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert resume_after_restart(copied) == {}


def test_a_finished_run_has_its_model_and_nothing_to_do(copied):
    trained = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(trained[:-7])  # killed when it wrote the last file
    assert finish(copied / "checkpoint-3", arguments(copied))
    assert (copied / "model.safetensors").read_bytes() == trained
    check_whole(copied)
    assert not (copied / "optimizer.pt").exists() and not (copied / RECORD).exists()
    assert not finish(copied / "checkpoint-2", arguments(copied))


def test_the_optimizer_is_kept_where_the_flag_says(small_model, questions, tmp_path):
    for keep, resumable in (("newest", [False, True]), ("none", [False, False])):
        out = tmp_path / keep
        make_trainer(small_model, questions, out, max_steps=2, keep_optimizer=keep).train()
        assert [(path / "optimizer.pt").exists() for path in checkpoints_in(out)] == resumable
        assert [(path / RECORD).exists() for path in checkpoints_in(out)] == resumable
        for path in checkpoints_in(out):
            check_whole(path)
            assert (path / "trainer_state.json").is_file()
    with pytest.raises(ValueError, match="weights only; --keep_optimizer all"):
        find_newest(tmp_path / "none")


def test_flags_to_go_on(tmp_path):
    def parse(*flags: str):
        return make_parser().parse_args_and_config(["--use_cpu", "true", "--output_dir", str(tmp_path), *flags])[2]

    assert parse("--resume").resume and parse("--resume_from_checkpoint", "true").resume
    assert parse("--resume_from_checkpoint", "true").resume_from_checkpoint is None
    assert not parse("--resume_from_checkpoint", "False").resume
    assert parse("--resume_from_checkpoint", "x").resume_from_checkpoint == "x"
    assert parse("--keep_optimizer", "none").save_only_model and not parse().save_only_model


def same_files(one: Path, other: Path) -> bool:
    """Weights, optimizer and schedule, bit for bit."""
    return all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt")
    )


@pytest.mark.slow
def test_killed_anywhere_in_a_save_the_old_state_or_the_new_one_is_there(
    finished, small_model, questions, tmp_path, monkeypatch
):
    """What a killed process leaves is what stands on the disk: a copy of it before every file operation of the saves."""
    out, copies, copying = tmp_path / "run", [], []

    def watch(module, name):
        function = getattr(module, name)

        def watched(*args, **kwargs):
            if out.is_dir() and not copying:
                copying.append(True)
                copies.append(shutil.copytree(out, tmp_path / f"copy {len(copies)}"))
                copying.clear()
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    trainer = make_trainer(small_model, questions, out)
    for module, name in (
        (os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (Path, "unlink"), (shutil, "rmtree"),
        (torch, "save"), (shutil, "copyfile"), (Path, "write_text"), (Path, "replace"), (Path, "rmdir"),
    ):  # fmt: skip
        watch(module, name)
    trainer.train()
    trainer._save_checkpoint(trainer.model, None)  # the last one's state once more, as after its evaluation
    trainer.save_result()
    monkeypatch.undo()
    assert len(copies) > 60
    newest = [0]
    for copy in copies:
        for checkpoint in checkpoints_in(copy):
            check_whole(checkpoint)
        if checkpoints_in(copy):
            start = choose_start(arguments(copy), trainer.run_settings)
            newest.append(step_of(start))
            assert newest[-1] in (newest[-2], newest[-2] + 1)
            assert same_files(start, finished / start.name)
        else:
            assert choose_start(arguments(copy, resume=False), {}) is None
        assert not (copy / ".partial").exists()
        if (copy / "model.safetensors").exists():
            assert (copy / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").exists() and not (out / ".partial").exists()
    assert set(newest) == {0, 1, 2, 3}


def test_sampled_rollouts_and_weights_of_a_resumed_run_are_bitwise_those_of_an_uninterrupted_one(
    finished, small_model, questions, tmp_path
):
    resumed = make_trainer(small_model, questions, tmp_path)
    resumed.train(resume_from_checkpoint=str(finished / "checkpoint-1"))
    for step in (2, 3):
        one, other = tmp_path / f"checkpoint-{step}", finished / f"checkpoint-{step}"
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert same_files(tmp_path / "checkpoint-3", finished / "checkpoint-3")


@pytest.mark.parametrize("step", [3, 8, 9])
def test_so_are_they_in_mid_batch_and_in_a_later_epoch(small_model, questions, reused, tmp_path, step):
    """Rollouts that four steps learn from, cut off between; the end of an epoch of eight steps; the second epoch."""
    folder, settings = reused
    resumed = make_trainer(small_model, questions, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert same_files(tmp_path / "checkpoint-10", folder / "checkpoint-10")


@pytest.fixture(scope="module")
def reused(small_model, questions, tmp_path_factory) -> tuple[Path, dict]:
    """An uninterrupted run that uses its rollouts twice, in four micro-batches; and its settings."""
    settings = dict(max_steps=10, num_iterations=2, steps_per_generation=4, keep_optimizer="all")
    folder = tmp_path_factory.mktemp("reused")
    make_trainer(small_model, questions, folder, **settings).train()
    return folder, settings


def test_on_other_processes_the_order_of_questions_goes_on(small_model, questions, reused, tmp_path):
    """A checkpoint of two processes, in mid-batch, resumed on one: rollouts are sampled anew, and none is left out."""
    folder, settings = reused
    checkpoint = shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    saved = torch.load(checkpoint / "rollouts_0.pt", weights_only=True)
    assert saved["step"] == 6 and len(saved["rollouts"]) == 4
    torch.save(saved | {"processes": 2, "step": 3}, checkpoint / "rollouts_0.pt")
    resumed = make_trainer(small_model, questions, tmp_path, **settings)
    resumed.state.global_step = 3
    resumed._load_rng_state(str(checkpoint))
    assert resumed._step == 6 and resumed._buffered_inputs is None


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epochs_order_follows_from_its_number(processes):
    """Through all the loaders that accelerate wraps around a sampler, the one that skips batches too."""
    order = QuestionOrder(range(40), mini_repeat_count=1, batch_size=4, shuffle=True, seed=5)
    epochs = []
    for epoch in (0, 1, 1):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert epochs[1] == epochs[2] != epochs[0]
    assert epochs[0] == list(RepeatSampler(range(40), 1, 4, 1, True, 5))

    seen = []

    class Epochs:
        def _run_epoch(self, *, epoch, train_dataloader, **kwargs):
            loader = skip_first_batches(train_dataloader, 2)
            loader.set_epoch(epoch)  # as transformers does
            seen.extend(row for batch in loader for row in batch.tolist())

    class Told(SelfContainedCheckpoints, Epochs):
        pass

    order.set_epoch(0)
    loader = prepare_data_loader(
        DataLoader(range(40), batch_size=2, sampler=order),
        num_processes=processes,
        process_index=0,
        put_on_device=False,
    )
    Told()._run_epoch(epoch=1, train_dataloader=loader)
    pairs = [epochs[1][i : i + 2] for i in range(0, 40, 2)][::processes][2:]
    assert seen == [row for pair in pairs for row in pair]
    seen.clear()
    Told()._run_epoch(epoch=1, train_dataloader=DataLoaderShard(range(8), batch_size=2))  # a sampler without epochs
    assert seen == [4, 5, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["", "ds_zero2", "ds_zero3"])
def test_a_run_that_was_killed_goes_on_by_the_launcher(preloaded, small_model, questions, tmp_path, engine):
    """All processes are killed in the second save, when the checkpoint would get its name."""
    skip_without_compiler(engine)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\nrename = os.rename\n"
        "def killed(source, target):\n"
        "    if str(target).endswith('checkpoint-2'):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(source, target)\n"
        "os.rename = killed\n"
    )
    flags = (
        "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2", "--max_completion_length", "4",
        "--learning_rate", "1e-2", "--save_steps", "1", "--max_steps", "3", "--report_to", "none",
    )  # fmt: skip
    places = dict(MODEL_NP=small_model, DATA_FILE=questions, CONFIG=f"conf/{engine}.json" if engine else "", GPU_NUM=2)
    places["PRELOADED"] = preloaded
    out = tmp_path / "killed"
    killed = run("sh", "run_grpo.sh", *flags, OUT_DIR=out, check=False, PYTHONPATH=tmp_path, **places)
    assert killed.returncode == 137 and [step_of(path) for path in checkpoints_in(out)] == [1], killed.stdout
    assert (out / ".partial" / "checkpoint-2").is_dir()
    run("sh", "run_grpo.sh", *flags, "--resume", OUT_DIR=out, **places)
    run("sh", "run_grpo.sh", *flags, OUT_DIR=tmp_path / "whole", **places)
    logs = [
        json.loads((path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        for path in (out, tmp_path / "whole")
    ]
    for resumed, whole in zip(*logs, strict=True):
        assert resumed["loss"] == pytest.approx(whole["loss"], abs=1e-4) and resumed["reward"] == whole["reward"]
    again = run("sh", "run_grpo.sh", *flags, "--resume", OUT_DIR=out, **places)
    assert "all steps are taken" in again.stdout
