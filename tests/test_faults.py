"""What a run of two processes does after a fault, and how many steps are lost: the table in docs/FAULTS.md.

A fault is a function with `@fault("name in the table")`. It takes a `Runs`, and returns the outcome and the steps lost:
steps that were begun and must be taken again, or were skipped. After every fault: no process is left, resumable
checkpoints load with all their digests, and the resumed run has the losses of an undisturbed one.

The table is written by  sh run_tests.sh -m slow tests/test_faults.py -s
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration

from conftest import ROOT
from evaluation.checkpoints import check_whole
from run.checkpoints import RECORD, checkpoints_in, find_newest, step_of
from running import environment
from runs import log_of, same

DOCUMENT = ROOT / "docs" / "FAULTS.md"
STEPS, SAVE_STEPS = 4, 2
FLAGS = (
    "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2", "--max_completion_length", "4",
    "--learning_rate", "1e-2", "--save_steps", SAVE_STEPS, "--max_steps", STEPS, "--seed", "3", "--report_to", "none",
    "--disable_tqdm", "true",
)  # fmt: skip
ARM = f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\nimport faults\nfaults.arm()\n"
REWARD = """
import json, os
def probe(completions, trainer_state, **kwargs):
    fault = json.loads(os.environ.get("STRIKE", "{}"))
    trial = not trainer_state.max_steps  # before the model is loaded
    if not trial and fault.get("step") == trainer_state.global_step + 1:
        from faults import strike
        strike(fault)
    return [len(text) / 10 for text in completions]
"""
FAULTS: dict[str, Callable[["Runs"], tuple[str, int]]] = {}
AS_OTHERS: set[str] = set()  # faults that leave what another one leaves
OUTCOMES: dict[str, tuple[str, int]] = {}


def fault(name: str, resumes: bool = True):
    """Register a fault; `resumes=False` where another one leaves the same, and the resumed run is that one's."""

    def register(function):
        assert name not in FAULTS
        FAULTS[name] = function
        if not resumes:
            AS_OTHERS.add(name)
        return function

    return register


class Runs:
    """The runs of one fault, in one folder. `more` are flags of all of them."""

    def __init__(self, folder: Path, model: Path, data: Path, whole: Path | None):
        self.folder, self.model, self.data, self.whole = folder, model, data, whole
        self.more: tuple = ()
        self.out, self.pids = folder / "out", folder / "pids"
        self.reward = (whole.parent if whole else folder) / "reward.py"  # the same for all: it is compared at a resume
        self.pids.mkdir()
        self.reward.write_text(REWARD)
        (folder / "sitecustomize.py").write_text(ARM)

    def run(self, *flags, fault: dict | None = None, restarts: int = 0, before: tuple = ()) -> tuple[int, str]:
        """Run the launcher: the exit status and what was printed."""
        command = [*before, "python", "src/run/launch.py", "src/train.py", *FLAGS, "--output_dir", self.out]
        command += ["--model_name_or_path", self.model, "--data_file", self.data, *self.more, *flags]
        command += ["--reward_funcs", f"{self.reward}:probe"]
        own = dict(PYTHONPATH=self.folder, FAULT=json.dumps(fault or {}), PIDS=self.pids)
        own |= dict(GPU_NUM=2, RESTARTS=restarts, CONFIG="")
        seen = len(self.said())
        with open(self.folder / "log", "a") as log:
            done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment(**own), stdout=log, stderr=log)
        status = done.returncode
        return status if status >= 0 else 128 - status, self.said()[seen:]

    def said(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def strike(self, what: str, step: int, rank: int = 1, paths=(), **more) -> tuple[int, str]:
        return self.run(fault={"what": what, "step": step, "rank": rank, "paths": paths}, **more)

    def finish(self, *flags) -> str:
        """Resume to the end, or start over where no checkpoint is; the losses are those of the undisturbed run."""
        status, said = self.run(*(["--resume"] if checkpoints_in(self.out) else []), *flags)
        assert status == 0, said
        self.assert_same_losses()
        return said

    def assert_same_losses(self) -> None:
        assert losses(self.out) == pytest.approx(losses(self.whole), abs=1e-4)

    def newest(self) -> int:
        """The step from which a run resumes."""
        checkpoint, _ = find_newest(self.out)
        return step_of(checkpoint) if checkpoint else 0

    def assert_nothing_is_left(self) -> None:
        """No process, after a moment for those that still save."""
        deadline = time.monotonic() + 120
        for number in (int(path.name) for path in self.pids.iterdir()):
            while is_alive(number):
                assert time.monotonic() < deadline, f"process {number} is left"
                time.sleep(0.05)

    def assert_it_loads(self) -> None:
        """Every resumable checkpoint, and the result if there is one."""
        folders = [path for path in checkpoints_in(self.out) if (path / RECORD).exists()]
        for folder in [*folders, *([self.out] if (self.out / "model.safetensors").exists() else [])]:
            check_whole(folder)
            Qwen2AudioForConditionalGeneration.from_pretrained(folder)


def is_alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def losses(out: Path) -> list[float]:
    newest = checkpoints_in(out)[-1]
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    found = [entry["loss"] for entry in log if "loss" in entry]
    assert len(found) == STEPS == step_of(newest)
    return found


@pytest.fixture(scope="module")
def whole(small_model, questions, tmp_path_factory) -> Iterator[Path]:
    """The output of an undisturbed run. The table is printed after all faults."""
    runs = Runs(tmp_path_factory.mktemp("whole"), small_model, questions, None)
    status, said = runs.run("--keep_optimizer", "all")
    assert status == 0, said
    yield runs.out
    print("\n\n" + table(OUTCOMES), flush=True)


# Killed


@fault("SIGKILL of one process in a step")
def kill_one(runs):
    status, said = runs.strike("SIGKILL", step=4)
    assert status == 137, said
    return "the others are stopped, exit status 137; --resume continues", 4 - runs.newest()


@fault("SIGKILL of one process in a step, RESTARTS=1")
def kill_one_with_restarts(runs):
    status, said = runs.strike("SIGKILL", step=4, rank=0, restarts=1)
    assert status == 0, said
    runs.assert_same_losses()
    return "the launcher resumes it", 2


@fault("SIGKILL of one process before the first checkpoint, RESTARTS=1")
def kill_early_with_restarts(runs):
    status, said = runs.strike("SIGKILL", step=1, restarts=1)
    assert status == 0, said
    runs.assert_same_losses()
    return "the launcher starts it over", 1


@fault("SIGKILL of one process with checkpoints that hold weights only, RESTARTS=1", resumes=False)
def kill_without_state(runs):
    runs.more = ("--keep_optimizer", "none", "--overwrite_output_dir", "true")
    status, said = runs.strike("SIGKILL", step=4, restarts=1)
    assert status == 2 and [path.name for path in checkpoints_in(runs.out)] == ["checkpoint-2"], said
    check_whole(runs.out / "checkpoint-2")
    return "the restart ends with an error and deletes nothing; the weights of step 2 are left", 4 - 2


@fault("SIGKILL of all processes and the launcher in a step", resumes=False)
def kill_all(runs):
    status, said = runs.strike("kill all", step=4)
    assert status == 137, said
    return "--resume continues", 4 - runs.newest()


@fault("SIGKILL of the launcher in a step", resumes=False)
def kill_launcher(runs):
    status, said = runs.strike("kill launcher", step=3)
    assert status == 137, said
    runs.assert_nothing_is_left()
    return "the processes finish the step, save and exit; --resume continues", 3 - runs.newest()


@fault("SIGKILL of the launcher while its processes import libraries", resumes=False)
def kill_launcher_early(runs):
    status, said = runs.run(fault={"what": "kill launcher", "rank": 1})
    assert status == 137, said
    runs.assert_nothing_is_left()
    assert not runs.out.exists() or not checkpoints_in(runs.out)
    return "its processes end, too", 0


@fault("SIGKILL at every file operation of the saves")
def kill_in_saves(runs):
    """What a killed process leaves is what is on the disk: a copy of it before every operation of process 0."""
    copies = runs.folder / "copies"
    copies.mkdir()
    status, said = runs.run(fault={"rank": 0, "copies": str(copies), "out": str(runs.out)})
    assert status == 0, said
    newest = []
    for copy in sorted(copies.iterdir()):
        found, _ = find_newest(copy)
        newest.append(step_of(found) if found else 0)
    assert newest == sorted(newest) and set(newest) == {0, 2, 4} and len(newest) > 40, newest
    middle = len(newest) - 1 - newest[::-1].index(2)  # the last moment at which the second save was incomplete
    shutil.rmtree(runs.out)
    shutil.copytree(sorted(copies.iterdir())[middle], runs.out)
    assert (runs.out / "checkpoint-4").is_dir()
    return "each leaves a checkpoint of the last save or the one before; --resume continues", 4 - 2


# Signals


@fault("SIGTERM to the launcher")
def terminate(runs):
    status, said = runs.strike("SIGTERM", step=3, rank=0)
    assert status == 0 and not (runs.out / "model.safetensors").exists(), said
    return "the step is finished and saved, exit status 0; --resume continues", 3 - runs.newest()


@fault("SIGINT to the launcher (Ctrl-C)", resumes=False)
def interrupt(runs):
    status, said = runs.strike("SIGINT", step=3, rank=0)
    assert status == 0 and not (runs.out / "model.safetensors").exists(), said
    return "the step is finished and saved, exit status 0; --resume continues", 3 - runs.newest()


@fault("SIGHUP to the launcher (a closed terminal)", resumes=False)
def hang_up(runs):
    status, said = runs.strike("SIGHUP SIGHUP", step=3, rank=0)
    assert status == 0 and not (runs.out / "model.safetensors").exists(), said
    return "the step is finished and saved, exit status 0; --resume continues", 3 - runs.newest()


@fault("SIGHUP to the launcher under nohup")
def hang_up_ignored(runs):
    status, said = runs.strike("SIGHUP", step=3, rank=0, before=("nohup",))
    assert status == 0 and (runs.out / "model.safetensors").exists(), said
    runs.assert_same_losses()
    return "the run continues to its end", 0


@fault("SIGTERM twice", resumes=False)
def terminate_twice(runs):
    status, said = runs.strike("SIGTERM SIGTERM", step=3, rank=0)
    assert status == 137, said
    return "ends at once without saving, exit status 137; --resume continues", 3 - runs.newest()


@fault("SIGTERM with --eval_file, --load_best_model_at_end true, --save_total_limit 1")
def terminate_with_best(runs):
    runs.more = ("--eval_file", runs.data, "--load_best_model_at_end", "true", "--save_total_limit", "1")
    runs.more += ("--save_steps", "1")
    status, said = runs.strike("SIGTERM", step=3, rank=0)
    assert status == 0, said
    lost = 3 - runs.newest()
    state = json.loads((runs.out / "checkpoint-3" / "trainer_state.json").read_text())
    best = f"checkpoint-{state['best_global_step']}"
    assert {path.name for path in checkpoints_in(runs.out)} == {best, "checkpoint-3"}
    runs.finish()
    state = json.loads((runs.out / "checkpoint-4" / "trainer_state.json").read_text())
    best = runs.out / f"checkpoint-{state['best_global_step']}"
    assert same(load_file(best / "model.safetensors"), load_file(runs.out / "model.safetensors"))
    return "the newest and the best checkpoint are kept; --resume continues, and the result is the best", lost


# Errors of one process


@fault("exception in a reward on one process", resumes=False)
def break_reward(runs):
    status, said = runs.strike("raise", step=3)
    assert status == 1 and said.strip().endswith("RuntimeError: the reward broke"), said
    return "all end, its traceback is printed last; --resume continues", 3 - runs.newest()


@fault("NaN in the loss of one process")
def break_loss(runs):
    status, said = runs.strike("nan loss", step=3)
    assert status == 0, said
    assert [entry["skipped_steps"] for entry in log_of(runs.out) if "skipped_steps" in entry] == [0, 0, 1, 1]
    return "all skip the step, which is counted", 1


@fault("one process hangs (SIGSTOP)")
def hang(runs):
    status, said = runs.run("--ddp_timeout", "10", fault={"what": "SIGSTOP", "step": 3, "rank": 1})
    assert status == 1 and "imed out" in said, said
    return "the others end the run after --ddp_timeout; --resume continues", 3 - runs.newest()


# Files


@fault("clips are removed")
def remove_clips(runs):
    data = shutil.copytree(runs.data.parent, runs.folder / "data")
    runs.data = data / runs.data.name
    status, said = runs.strike("remove clips", step=1, rank=0, paths=[str(data / f"{i}.wav") for i in range(4)])
    assert status == 0 and len(losses(runs.out)) == STEPS, said
    assert sum(entry.get("clips/replaced", 0) for entry in log_of(runs.out)) > 0
    return "their questions are replaced and counted", 0


@fault("the disk is full in a save")
def fill_disk(runs):
    status, said = runs.strike("fill disk", step=3, rank=0)
    assert status == 2 and "checkpoint-4" in said, said
    assert [path.name for path in checkpoints_in(runs.out)] == ["checkpoint-2"]
    return "ends with an error, nothing torn is left; --resume continues", 4 - runs.newest()


@fault("a file of the newest checkpoint is truncated, or its optimizer filled with zeros")
def tear(runs):
    shutil.copytree(runs.whole, runs.out)
    (runs.out / "model.safetensors").unlink()
    newest = runs.out / "checkpoint-4"
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", RECORD, "zeros"):
        file = newest / ("optimizer.pt" if name == "zeros" else name)
        content = file.read_bytes()
        file.write_bytes(bytes(len(content)) if name == "zeros" else content[:-7])
        assert runs.newest() == 2, name
        if name != "zeros":
            file.write_bytes(content)
    said = runs.finish()
    assert "optimizer.pt" in said
    return "passed over by name; --resume continues from the one before", 4 - 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills and stops processes as Linux does")
@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, whole, small_model, questions, tmp_path):
    runs = Runs(tmp_path, small_model, questions, whole)
    outcome, lost = FAULTS[name](runs)
    runs.assert_nothing_is_left()
    runs.assert_it_loads()
    if name not in AS_OTHERS and not (runs.out / "model.safetensors").exists():
        runs.finish()
    assert lost <= SAVE_STEPS
    OUTCOMES[name] = outcome, lost
    assert table({name: OUTCOMES[name]}).splitlines()[-1] in DOCUMENT.read_text(encoding="utf-8").splitlines()


def table(outcomes: dict[str, tuple[str, int]]) -> str:
    rows = [f"| {name} | {outcome} | {lost} |" for name, (outcome, lost) in outcomes.items()]
    return "\n".join(["| fault | outcome | steps lost |", "|---|---|---|", *rows])


def test_the_document_has_a_row_for_every_fault():
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert rows == ["fault", *FAULTS]
