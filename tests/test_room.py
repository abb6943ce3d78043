"""A disk that is full or gone in mid-run: what was whole stays, the run says what it lacks, and a log is not worth it."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

import startup
from running import run
from test_resume import make_trainer
from test_sft import make_trainer as make_sft_trainer
from trainer import room
from trainer.console import append_line
from trainer.resume import check_resumable, checkpoints_in, step_of

undrawn = pytest.mark.usefixtures("undrawn")


class InStep(TrainerCallback):
    """Calls a function in the middle of a step."""

    def __init__(self, step: int, do):
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.do()


def assert_ends_with_its_last_checkpoint_whole(trainer, out, *said: str) -> str:
    """The run ends with one sentence that names what is there, and what is there is the checkpoint of step 1 alone."""
    with pytest.raises(SystemExit) as ended:
        startup.train(trainer, None)
    message = str(ended.value.code)
    for part in (*said, f"The last good checkpoint is {out / 'checkpoint-1'}: --resume goes on from it"):
        assert part in message, message
    assert checkpoints_in(out) == [out / "checkpoint-1"] and not (out / ".partial").exists()
    check_resumable(out / "checkpoint-1")
    return message


def test_what_a_checkpoint_will_take_is_known_before(small_model, questions, tmp_path):
    trainer = make_trainer(small_model, questions, tmp_path, max_steps=1)
    weights, state = room.weight_bytes(trainer), room.state_bytes(trainer)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert weights == pytest.approx((checkpoint / "model.safetensors").stat().st_size, rel=0.05)
    assert state == pytest.approx(room.state_bytes(trainer), rel=0.01)
    assert state == pytest.approx(
        (checkpoint / "optimizer.pt").stat().st_size, rel=0.15
    )  # and its small tensors' names
    trainer.args.save_only_model = True
    assert room.state_bytes(trainer) == 0


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes the disk is said to have."""

    def free(size: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))

    return free


@undrawn
def test_a_save_that_cannot_fit_is_not_begun(small_model, questions, tmp_path, free, monkeypatch):
    trainer = make_trainer(small_model, questions, tmp_path)
    needed = room.MARGIN * (room.weight_bytes(trainer) + room.state_bytes(trainer))
    monkeypatch.setattr(room, "GB", needed)  # what a message counts in
    free(10 * needed)
    trainer.add_callback(InStep(2, lambda: free(0.9 * needed)))
    begun, write = [], trainer.save_model
    monkeypatch.setattr(
        trainer, "save_model", lambda *args, **kwargs: begun.append(trainer.state.global_step) or write(*args, **kwargs)
    )
    out = tmp_path
    assert_ends_with_its_last_checkpoint_whole(
        trainer, out, f"{out / 'checkpoint-2'}: not written, since it needs 1.00 GB and 0.90 GB are free there",
        "Make room, or keep less",
    )  # fmt: skip
    assert begun == [1]


@undrawn
def test_what_will_not_fit_is_said_before_the_first_step(small_model, questions, tmp_path, capsys, free, monkeypatch):
    trainer = make_trainer(small_model, questions, tmp_path, keep_optimizer="all", save_total_limit=2)
    weights, state = room.weight_bytes(trainer), room.state_bytes(trainer)
    for size, kept in ((3 * weights + 2 * state, False), (3.2 * weights + 2.2 * state, True)):
        free(size)
        room.foresee_room(trainer, 0)
        assert ("2 checkpoints and the result need" not in capsys.readouterr().out) == kept
    free(weights + state)  # without what stands beside them
    with pytest.raises(SystemExit) as ended:
        startup.train(trainer, None)
    said = str(ended.value.code)
    assert "the first checkpoint: not written, since it needs" in said and "a new run has to start" in said
    assert trainer.state.global_step == 0
    trainer.args.optim = "adafactor"  # whose state is smaller than is known
    room.foresee_room(trainer, 0)


@contextmanager
def no_file_over(size: int):
    """A real limit of the system on what one file may hold."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SLOW = pytest.mark.slow


@undrawn
@pytest.mark.parametrize(
    ("file", "share"),
    [("model.safetensors", 0.5), ("optimizer.pt", 0.8), pytest.param("scheduler.pt", 0.5, marks=SLOW)],
)
def test_a_write_that_fails_leaves_the_checkpoint_before(small_model, questions, tmp_path, file, share):
    """By a limit that this file alone, or it first, is over; torch and safetensors raise what they like."""
    with no_file_over(resource.RLIM_INFINITY):
        trainer = make_trainer(small_model, questions, tmp_path)

        def limit():
            size = int(share * (tmp_path / "checkpoint-1" / file).stat().st_size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        trainer.add_callback(InStep(2, limit))
        assert_ends_with_its_last_checkpoint_whole(trainer, tmp_path, "checkpoint-2: not written (")


@undrawn
@pytest.mark.parametrize("name", ["fsync", pytest.param("rename", marks=SLOW)])
def test_so_does_a_disk_that_fails_when_the_checkpoint_would_get_its_name(
    small_model, questions, tmp_path, monkeypatch, name
):
    trainer, operation = make_trainer(small_model, questions, tmp_path), getattr(os, name)

    def fail(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return operation(*args, **kwargs)

    monkeypatch.setattr(os, name, fail)
    assert_ends_with_its_last_checkpoint_whole(trainer, tmp_path, "(No space left on device)")


@undrawn
def test_an_error_of_ours_in_a_save_keeps_its_traceback(small_model, questions, tmp_path, monkeypatch):
    trainer = make_trainer(small_model, questions, tmp_path)

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trainer, "_save_rng_state", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        startup.train(trainer, None)


@undrawn
@SLOW
def test_an_output_folder_that_was_removed_is_made_again(small_model, questions, tmp_path):
    out = tmp_path / "out"
    trainer = make_trainer(small_model, questions, out)
    trainer.add_callback(InStep(2, lambda: shutil.rmtree(out)))
    startup.train(trainer, None)
    assert [step_of(path) for path in checkpoints_in(out)] == [2, 3] and (out / "model.safetensors").is_file()
    check_resumable(out / "checkpoint-3")


def test_logs_that_cannot_be_written_cost_a_warning_each(small_model, questions, tmp_path, capsys, monkeypatch):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    (tmp_path / "training.png").mkdir()
    trainer = make_trainer(small_model, questions, tmp_path)
    with open("/dev/full", "w") as full:
        trainer.add_callback(InStep(2, lambda: monkeypatch.setattr(sys, "stdout", full)))
        startup.train(trainer, None)
        sys.stdout.close()
        monkeypatch.undo()
        assert len(checkpoints_in(tmp_path)) == 3 and (tmp_path / "model.safetensors").is_file()
        said = capsys.readouterr()
        assert "1/3" in said.out and "2/3" not in said.out
        for name in (f"{tmp_path / 'log.jsonl'}: not written", "training.png: not written", "standard output: cannot"):
            assert said.err.count(name) == 1, said.err
        with pytest.raises(OSError):
            full.close()


def test_a_log_goes_on_after_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    for line in ("a", "b"):
        append_line(path, line)
    path.write_text(path.read_text() + '{"step": 3, "lo')
    append_line(path, "c")
    assert path.read_text().split("\n") == ["a", "b", '{"step": 3, "lo', "c", ""]


@undrawn
@pytest.mark.parametrize("kind", [pytest.param("grpo", marks=SLOW), "sft"])
def test_a_data_folder_that_is_gone_ends_the_run_in_a_sentence(small_model, questions, tmp_path, kind):
    data = shutil.copytree(questions.parent, tmp_path / "data") / questions.name
    out = tmp_path / "out"
    if kind == "grpo":
        trainer = make_trainer(small_model, data, out)
    else:
        trainer = make_sft_trainer(small_model, data, out, save_strategy="steps", save_steps=1, max_steps=3)
    # In step 1, for the loader is a batch ahead.
    trainer.add_callback(InStep(1, lambda: shutil.rmtree(tmp_path / "data")))
    message = assert_ends_with_its_last_checkpoint_whole(
        trainer, out, "11 clips in a row", "no such audio file", "Was the data's folder moved or removed"
    )
    assert len(message) < 700


@SLOW
def test_a_disk_that_fills_in_a_save_by_the_launcher(preloaded, small_model, questions, tmp_path):
    """Two processes write to a real file system that holds one checkpoint and a part of the next, and that looks larger
    than it is, as where somebody else fills it. On a larger one, the run goes on."""
    out, mounted = tmp_path / "out", tmp_path / "mounted"
    mounted.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", mounted], capture_output=True).returncode:
        pytest.skip("needs to mount a file system in a namespace of its own")
    make_trainer(small_model, questions, tmp_path / "whole", max_steps=1).train()
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-1").rglob("*"))
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil\nusage = shutil.disk_usage\nshutil.disk_usage = lambda path: usage(path)._replace(free=10**12)\n"
    )
    flags = (
        "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2", "--max_completion_length", "4",
        "--learning_rate", "1e-2", "--save_steps", "1", "--max_steps", "2", "--report_to", "none",
    )  # fmt: skip
    places = dict(MODEL_NP=small_model, DATA_FILE=questions, CONFIG="", GPU_NUM=2)
    script = (
        'mount -t tmpfs -o size=$1 none "$2" && shift 2 && { sh run_grpo.sh "$@"; status=$?; '
        'cp -r "$OUT_DIR" "$COPY"; exit $status; }'
    )
    done = run(
        "unshare", "-rm", "sh", "-c", script, "sh", int(1.6 * size), mounted, *flags, check=False,
        OUT_DIR=mounted / "out", COPY=out, PYTHONPATH=tmp_path, **places,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert "checkpoint-2: not written (" in last and "checkpoint-1: --resume goes on from it" in last, done.stdout
    assert done.stdout.count("checkpoint-2: not written") == 1
    assert checkpoints_in(out) == [out / "checkpoint-1"] and not (out / ".partial").exists()
    run("sh", "run_grpo.sh", *flags, "--resume", OUT_DIR=out, PRELOADED=preloaded, **places)
    assert step_of(checkpoints_in(out)[-1]) == 2 and (out / "model.safetensors").is_file()
