"""run/checkpoints.py: a resumed run is the undisturbed one; which checkpoints are whole, kept, and resumed from."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from run.checkpoints import RECORD, checkpoints_in, choose_start, find_newest, read_settings
from run.startup import train
from runs import InStep, history_of, make_run, names

WEIGHTS = "model.safetensors"


def resumable(out: Path) -> list[str]:
    return [path.name for path in checkpoints_in(out) if (path / RECORD).exists()]


# A resumed run


@pytest.mark.parametrize(
    ("kind", "flags", "last", "starts"),
    [
        ("grpo", {}, 4, (1, 3)),  # two steps take all eight questions once: 3 is in the second epoch
        ("grpo", dict(num_iterations=2), 8, (2, 6)),  # a rollout is used up after two steps
        ("grpo", dict(steps_per_generation=4), 4, (2,)),
        ("sft", {}, 4, (1, 3)),
    ],
)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(small_model, questions, tmp_path, kind, flags, last, starts):
    size = 4 if kind == "grpo" else 2
    flags = dict(questions_per_step=4, per_device_train_batch_size=size, max_steps=last, keep_optimizer="all") | flags
    whole = tmp_path / "whole"
    train(make_run(kind, small_model, questions, whole, **flags), None)
    every = 2 if "num_iterations" in flags or "steps_per_generation" in flags else 1
    assert names(whole) == [f"checkpoint-{step}" for step in range(every, last + 1, every)], "a rollout is used up"
    for start in starts:
        out = tmp_path / f"from {start}"
        checkpoint = shutil.copytree(whole / f"checkpoint-{start}", out / f"checkpoint-{start}")
        train(make_run(kind, small_model, questions, out, **flags), checkpoint)
        assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
        assert history_of(out / f"checkpoint-{last}") == history_of(whole / f"checkpoint-{last}")


# Which checkpoint is whole


@pytest.fixture(scope="module")
def finished(small_model, questions, tmp_path_factory) -> Path:
    """The output of a run of three steps, whose checkpoints all are resumable."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(make_run("grpo", small_model, questions, out, keep_optimizer="all"), None)
    return out


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "flipped": flip,
    "zeros": lambda content: bytes(len(content)),
    "truncated": lambda content: content[:-7],
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", RECORD, WEIGHTS, "tokenizer.json"]
)
def test_a_damaged_newest_checkpoint_is_passed_over(copied, name, damage):
    file = copied / "checkpoint-3" / name
    if change := DAMAGES[damage]:
        file.write_bytes(change(file.read_bytes()))
    else:
        file.unlink()
    settings = read_settings(copied / "checkpoint-2")
    assert choose_start(arguments(copied), settings, restarted=False) == copied / "checkpoint-2"


@pytest.mark.parametrize("name", ["optimizer.pt", WEIGHTS])
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(copied, name):
    settings, start = read_settings(copied / "checkpoint-3"), copied / "checkpoint-3"
    (start / name).write_bytes(flip((start / name).read_bytes()))
    with pytest.raises(ValueError, match=name):
        choose_start(arguments(copied, resume=False, resume_from_checkpoint=str(start)), settings, restarted=False)


def test_every_changed_digit_of_a_record_is_found(copied):
    record = copied / "checkpoint-3" / RECORD
    content = record.read_text()
    for before, after in (('"beta": 0.04', '"beta": 0.05'), ('"seed": 3', '"seed": 4')):
        assert before in content
        record.write_text(content.replace(before, after))
        assert find_newest(copied)[0] == copied / "checkpoint-2"


# Which checkpoint a run resumes from


def arguments(out: Path, **flags) -> SimpleNamespace:
    defaults = dict(
        output_dir=str(out), resume=True, resume_from_checkpoint=None, force_resume=False, overwrite_output_dir=False
    )
    return SimpleNamespace(**defaults | flags)


def test_where_nothing_is_whole_all_reasons_are_named(copied, tmp_path):
    for checkpoint in checkpoints_in(copied):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError) as refused:
        choose_start(arguments(copied), {}, restarted=False)
    assert str(refused.value).count("optimizer.pt") == 3
    with pytest.raises(ValueError, match="--resume"):
        choose_start(arguments(tmp_path / "empty"), {}, restarted=False)


def test_changed_settings_are_named(copied):
    settings = read_settings(copied / "checkpoint-3")
    other = settings | {"beta": 0.5, "seed": 7, "data_file (content)": "x"}
    with pytest.raises(ValueError) as refused:
        choose_start(arguments(copied), other, restarted=False)
    for part in ("beta 0.04, now 0.5", "seed 3, now 7", "data_file (content) None, now x", "--force_resume true"):
        assert part in str(refused.value)
    assert "questions_per_step" not in str(refused.value)
    assert choose_start(arguments(copied, force_resume=True), other, restarted=False) == copied / "checkpoint-3"


def test_state_of_another_engine_is_refused_even_by_force(copied):
    """DeepSpeed would fail in an assertion."""
    settings = read_settings(copied / "checkpoint-3")
    for engine in ("ZeRO-2 on 2 processes", "ZeRO-3 on 2 processes"):
        with pytest.raises(ValueError, match=engine):
            choose_start(arguments(copied, force_resume=True), settings | {"engine": engine}, restarted=False)


def test_checkpoints_of_another_run_are_refused_and_not_removed(copied):
    settings, first = read_settings(copied / "checkpoint-3"), copied / "checkpoint-1"
    with pytest.raises(ValueError, match="checkpoint-1, checkpoint-2, checkpoint-3 .*--overwrite_output_dir"):
        choose_start(arguments(copied, resume=False), settings, restarted=False)
    with pytest.raises(ValueError, match="checkpoint-2, checkpoint-3 .*--overwrite_output_dir"):
        choose_start(arguments(copied, resume=False, resume_from_checkpoint=str(first)), settings, restarted=False)
    overwriting = arguments(copied, resume=False, overwrite_output_dir=True)
    assert choose_start(overwriting, settings, restarted=False) is None
    overwriting.resume_from_checkpoint = str(first)
    assert choose_start(overwriting, settings, restarted=False) == first
    assert len(names(copied)) == 3


def test_a_restart_resumes_and_starts_over_only_without_checkpoints(copied, tmp_path):
    settings = read_settings(copied / "checkpoint-3")
    for flags in ({}, dict(overwrite_output_dir=True), dict(resume_from_checkpoint=str(copied / "checkpoint-1"))):
        start = choose_start(arguments(copied, resume=False, **flags), settings, restarted=True)
        assert start == copied / "checkpoint-3"
    elsewhere = arguments(tmp_path / "out", resume=False)
    assert choose_start(elsewhere, settings, restarted=True) is None
    elsewhere.resume_from_checkpoint = str(copied / "checkpoint-1")
    assert choose_start(elsewhere, settings, restarted=True) == copied / "checkpoint-1"


@pytest.mark.parametrize("file", [RECORD, "optimizer.pt"])
def test_a_restart_without_a_resumable_checkpoint_fails_and_deletes_nothing(copied, file):
    settings = read_settings(copied / "checkpoint-3")
    for checkpoint in checkpoints_in(copied):
        (checkpoint / file).unlink()
    for overwrite in (False, True):
        with pytest.raises(ValueError):
            choose_start(arguments(copied, resume=False, overwrite_output_dir=overwrite), settings, restarted=True)
    assert len(names(copied)) == 3


# What is kept


@pytest.mark.parametrize(
    ("flags", "kept", "with_state"),
    [
        (dict(), [1, 2, 3], [3]),
        (dict(keep_optimizer="none"), [1, 2, 3], []),
        (dict(keep_optimizer="all", save_total_limit=2), [2, 3], [2, 3]),
        (dict(save_total_limit=1), [3], [3]),
    ],
)
def test_checkpoints_and_states_that_are_kept(small_model, questions, tmp_path, flags, kept, with_state):
    train(make_run("sft", small_model, questions, tmp_path, **flags), None)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]
    assert resumable(tmp_path) == [f"checkpoint-{step}" for step in with_state]
    for checkpoint in checkpoints_in(tmp_path):
        assert (checkpoint / "optimizer.pt").exists() == (checkpoint / RECORD).exists()
        assert (checkpoint / WEIGHTS).exists() and (checkpoint / "trainer_state.json").exists()


# Writes that fail


def assert_ends_resumable(trainer, out: Path) -> None:
    """The run ends as after a user's mistake. What is left is the checkpoint of step 1."""
    with pytest.raises(SystemExit) as ended:
        train(trainer, None)
    assert "checkpoint-2" in str(ended.value.code) and "checkpoint-1" in str(ended.value.code)
    assert names(out) == ["checkpoint-1"] and find_newest(out) == (out / "checkpoint-1", [])
    assert not (out / WEIGHTS).exists()


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_not_begun(small_model, questions, tmp_path, monkeypatch):
    trainer = make_run("sft", small_model, questions, tmp_path)

    def fill():
        size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*"))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size // 2))

    trainer.add_callback(InStep(2, fill))
    assert_ends_resumable(trainer, tmp_path)
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("where", ["model.safetensors", "optimizer.pt", RECORD])
def test_a_failed_write_leaves_nothing_torn(small_model, questions, tmp_path, monkeypatch, where):
    trainer = make_run("sft", small_model, questions, tmp_path)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(path) -> None:
        path = Path(path)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"torn")
        raise error

    def break_writes():
        if where == RECORD:
            monkeypatch.setattr("run.checkpoints.write_whole", lambda path, text: fail(path))
        elif where == "optimizer.pt":
            monkeypatch.setattr("torch.save", lambda value, path, **_: fail(path))
        else:
            monkeypatch.setattr(type(trainer.model), "save_pretrained", lambda self, out, **_: fail(Path(out, where)))

    trainer.add_callback(InStep(2, break_writes))
    assert_ends_resumable(trainer, tmp_path)


def test_an_error_of_another_kind_keeps_its_traceback(small_model, questions, tmp_path, monkeypatch):
    trainer = make_run("sft", small_model, questions, tmp_path)

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.save", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(trainer, None)


# Runs of the script


@pytest.fixture
def flags(small_model, questions, tmp_path) -> list:
    return [
        "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2", "--max_completion_length", "4",
        "--max_steps", "2", "--save_steps", "1", "--report_to", "none", "--disable_tqdm", "true",
        "--learning_rate", "1e-2", "--model_name_or_path", small_model, "--data_file", questions,
        "--output_dir", tmp_path / "out",
    ]  # fmt: skip


def test_settings_that_a_resume_accepts_or_refuses(script, flags, tmp_path):
    """One run; then what is refused before a model is loaded, by name; then what may change."""
    out, reward = tmp_path / "out", tmp_path / "reward.py"
    code = "def mine(completions, **_):\n    return [float(len(text)) for text in completions]\n"
    reward.write_text(code)
    flags += ["--reward_funcs", f"{reward}:mine", "--keep_optimizer", "all"]
    assert script("train.py", *flags)[0] == 0
    weights = (out / WEIGHTS).read_bytes()
    for name, value in (
        ("use_rslora", "true"), ("sapo_temperature_neg", "1.5"), ("neftune_noise_alpha", "5"), ("disable_dropout", "true"),
        ("beta", "0.5"), ("max_steps", "3"), ("questions_per_step", "4"), ("freeze", "projector"), ("epsilon", "0.3"),
    ):  # fmt: skip
        status, said = script("train.py", *flags, "--resume", f"--{name}", value)
        assert status == 2 and name in said, said
    reward.write_text(code + "\n")
    status, said = script("train.py", *flags, "--resume")
    assert status == 2 and "reward.py" in said
    reward.write_text(code)
    (out / WEIGHTS).unlink()
    assert script("train.py", *flags, "--resume")[0] == 0, "a finished run writes its model"
    assert (out / WEIGHTS).read_bytes() == weights
    assert names(out) == ["checkpoint-1", "checkpoint-2"]

    shutil.rmtree(out / "checkpoint-2")
    may_change = ["--per_device_train_batch_size", "4", "--save_steps", "5", "--logging_steps", "2"]
    assert script("train.py", *flags, "--resume", *may_change)[0] == 0
    assert names(out) == ["checkpoint-1", "checkpoint-2"]
    forced = ["--resume", "--max_steps", "3", "--beta", "0.5", "--force_resume", "true"]
    assert script("train.py", *flags, *forced)[0] == 0
    assert names(out) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_restarts_of_the_script(script, flags, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("RUN_RESTART", "1")
    assert script("train.py", *flags, "--keep_optimizer", "none")[0] == 0, "without a checkpoint it starts over"
    (out / "test_1").mkdir()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for more in ([], ["--overwrite_output_dir", "true"]):
        status, said = script("train.py", *flags, *more)
        assert status == 2 and "checkpoint-2" in said
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert (out / "test_1").is_dir() and before == {path: after[path] for path in before}

    monkeypatch.setenv("RUN_RESTART", "0")
    (out / "test_2").mkdir()
    assert script("train.py", *flags)[0] == 2, "checkpoints of another run"
    assert script("train.py", *flags, "--overwrite_output_dir", "true", "--max_steps", "1")[0] == 0
    assert names(out) == ["checkpoint-1"] and not list(out.glob("test_*"))
    monkeypatch.setenv("RUN_RESTART", "1")
    more = ["--overwrite_output_dir", "true", "--max_steps", "2"]
    status, said = script("train.py", *flags, *more)
    assert status == 2 and "max_steps" in said and names(out) == ["checkpoint-1"]
    assert script("train.py", *flags, *more, "--force_resume", "true")[0] == 0
    assert json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    assert resumable(out) == ["checkpoint-2"]
