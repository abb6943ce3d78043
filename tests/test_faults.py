"""What befalls a run of two processes, what it makes of it, and how many steps are lost: the table in docs/FAULTS.md.

A fault is a function with `@fault("its name in the table")` that takes a `Runs` and returns the outcome and the steps
lost: steps that were begun and must be taken again. What holds after every fault is checked for all of them: no process
is left, what is on the disk loads, and the run that goes on has the losses of one that was never disturbed.

Written by  sh run_tests.sh -m slow tests/test_faults.py -s
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from transformers import Qwen2AudioForConditionalGeneration

from conftest import ROOT
from model.checkpoints import check_whole
from running import environment
from trainer.resume import PARTIAL, checkpoints_in, resumable_steps, step_of

STEPS, SAVE_STEPS = 4, 2
FLAGS = (
    "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2", "--max_completion_length", "4",
    "--learning_rate", "1e-2", "--save_steps", SAVE_STEPS, "--max_steps", STEPS, "--seed", "3", "--report_to", "none",
    "--disable_tqdm", "true", "--keep_optimizer", "all",
)  # fmt: skip
ARM = f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\nimport faults\nfaults.arm()\n"
REWARD = """
import json, os
calls = -1 if os.environ.get("RANK") == "0" else 0  # the first process tries it once, before the model is loaded
def probe(completions, **kwargs):
    global calls
    calls += 1
    fault = json.loads(os.environ.get("STRIKE", "{}"))
    if fault.get("step") == calls:
        from faults import strike
        strike(fault)
    return [len(text) / 10 for text in completions]
"""
FAULTS: dict[str, Callable[["Runs"], tuple[str, int]]] = {}
OUTCOMES: dict[str, tuple[str, int]] = {}


def fault(name: str):
    def register(function):
        assert name not in FAULTS
        FAULTS[name] = function
        return function

    return register


class Runs:
    """One fault's runs, in a folder of its own."""

    def __init__(self, folder: Path, preloaded: Path, model: Path, data: Path, whole: Path | None):
        self.folder, self.preloaded, self.model, self.data, self.whole = folder, preloaded, model, data, whole
        self.out, self.pids = folder / "out", folder / "pids"
        self.reward = (whole.parent if whole else folder) / "reward.py"  # the same for all, as one's settings are
        self.pids.mkdir()
        self.reward.write_text(REWARD)
        (folder / "sitecustomize.py").write_text(ARM)

    def run(self, *flags, fault: dict | None = None, restarts: int = 0) -> tuple[int, str]:
        """Start the launcher and wait for its end: the exit status, and what this run printed. The processes it starts
        leave their ids in `pids`."""
        argv = ["--standalone", "--nproc_per_node", "2", "--max_restarts", restarts, "src/train.py", *FLAGS]
        places = ("--model_name_or_path", self.model, "--data_file", self.data, "--output_dir", self.out)
        argv += [*places, "--reward_funcs", f"{self.reward}:probe", *flags]
        own = dict(PRELOADED=self.preloaded, PYTHONPATH=self.folder, FAULT=json.dumps(fault or {}), PIDS=self.pids)
        before = len(self.said())
        with open(self.folder / "log", "a") as log:
            command = ["python", "src/launch/start.py", *map(str, argv)]
            status = subprocess.run(command, cwd=ROOT, env=environment(**own), stdout=log, stderr=log).returncode
        return status if status >= 0 else 128 - status, self.said()[before:]

    def said(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def strike(self, what: str, step: int, rank: int = 1, restarts: int = 0, **more) -> tuple[int, str]:
        return self.run(fault={"what": what, "step": step, "rank": rank, **more}, restarts=restarts)

    def resume(self) -> str:
        """Go on to the end; the losses are those of the undisturbed run."""
        status, said = self.run("--resume")
        assert status == 0, said
        self.assert_same_losses()
        return said

    def assert_same_losses(self) -> None:
        for found, expected in zip(losses(self.out), losses(self.whole), strict=True):
            assert found == pytest.approx(expected, abs=1e-4)

    def newest(self) -> int:
        return max(resumable_steps(self.out), default=0)

    def assert_nothing_is_left(self) -> None:
        """No process of the run, after a moment for those that save on their way out."""
        deadline = time.monotonic() + 60
        for number in (int(path.name) for path in self.pids.iterdir()):
            while is_alive(number):
                assert time.monotonic() < deadline, f"process {number} is left"
                time.sleep(0.05)

    def assert_it_loads(self) -> None:
        """Every checkpoint, and no result unless it is whole."""
        for checkpoint in checkpoints_in(self.out):
            check_whole(checkpoint)
            Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint)
        if (self.out / "model.safetensors").exists():
            check_whole(self.out)


def is_alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def losses(out: Path) -> list[float]:
    newest = checkpoints_in(out)[-1]
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    found = [entry["loss"] for entry in log if "loss" in entry]
    assert len(found) == STEPS and step_of(newest) == STEPS
    return found


@pytest.fixture(scope="module")
def whole(preloaded, small_model, questions, tmp_path_factory) -> Path:
    """The output of the run that nothing befell."""
    runs = Runs(tmp_path_factory.mktemp("whole"), preloaded, small_model, questions, None)
    status, said = runs.run()
    assert status == 0, said
    return runs.out


# Killed


@fault("SIGKILL of one process in a step")
def kill_one(runs):
    status, said = runs.strike("SIGKILL", step=4)
    assert status == 137 and said.endswith("out of memory, if nobody sent it; the others were stopped\n")
    return "the others are stopped within seconds; --resume goes on", 4 - runs.newest()


@fault("SIGKILL of one process in a step, RESTARTS=1")
def kill_one_with_restarts(runs):
    status, said = runs.strike("SIGKILL", step=4, rank=0, restarts=1)
    assert status == 0 and "restart 1 of 1\n" in said, said
    runs.assert_same_losses()
    return "goes on by itself", 2


@fault("SIGKILL of one process before the first checkpoint, RESTARTS=1")
def kill_early_with_restarts(runs):
    status, said = runs.strike("SIGKILL", step=1, restarts=1)
    assert status == 0 and "restart 1 of 1\n" in said, said
    runs.assert_same_losses()
    return "starts over by itself", 1


@fault("SIGKILL of all processes and the launcher in a step")
def kill_all(runs):
    status, _ = runs.strike("kill all", step=4)
    assert status == 137
    return "--resume goes on", 4 - runs.newest()


@fault("SIGKILL of the launcher")
def kill_launcher(runs):
    status, said = runs.strike("kill launcher", step=3)
    assert status == 137
    runs.assert_nothing_is_left()
    assert "SIGTERM: stopped after step 3" in runs.said()
    return "the processes finish the step, save and exit; --resume goes on", 3 - runs.newest()


@fault("SIGKILL at every file operation of the saves")
def kill_in_saves(runs):
    """What a killed process leaves is what stands on the disk: a copy of it before every operation of process 0."""
    copies = runs.folder / "copies"
    copies.mkdir()
    status, said = runs.run(fault={"rank": 0, "copies": str(copies), "out": str(runs.out)})
    assert status == 0, said
    newest = []
    for copy in sorted(copies.iterdir()):
        for checkpoint in checkpoints_in(copy):
            check_whole(checkpoint)
        newest.append(max(resumable_steps(copy), default=0))
    assert newest == sorted(newest) and set(newest) == {0, 2, 4} and len(newest) > 60
    middle = len(newest) - 1 - newest[::-1].index(2)  # the last moment at which the second save was not whole
    shutil.rmtree(runs.out)
    shutil.copytree(sorted(copies.iterdir())[middle], runs.out)
    assert (runs.out / PARTIAL / "checkpoint-4").is_dir()
    return "each leaves the old state or the new one; --resume goes on", 4 - 2


# Told to stop


def told(runs, *names: str) -> tuple[int, str]:
    status, said = runs.strike(" ".join(names), step=3, rank=0)
    return status, said


@fault("SIGTERM to the launcher")
def terminate(runs):
    status, said = told(runs, "SIGTERM")
    assert status == 0 and said.splitlines()[-1].startswith("SIGTERM: stopped after step 3; "), said
    return "the step is finished and saved, exit status 0; --resume goes on", 3 - runs.newest()


@fault("SIGINT to the launcher (Ctrl-C)")
def interrupt(runs):
    status, said = told(runs, "SIGINT")
    assert status == 0 and said.splitlines()[-1].startswith("SIGINT: stopped after step 3; "), said
    return "the step is finished and saved, exit status 0; --resume goes on", 3 - runs.newest()


@fault("SIGTERM twice")
def terminate_twice(runs):
    status, said = told(runs, "SIGTERM", "SIGTERM")
    assert status == 143 and "Traceback" not in said, said
    return "ends at once; --resume goes on", 3 - runs.newest()


# Errors in one process


@fault("exception in a reward on one process")
def break_reward(runs):
    status, said = runs.strike("raise", step=3)
    assert status == 1 and said.endswith("RuntimeError: the reward broke\n"), said
    return "its traceback is the last thing printed; --resume goes on", 3 - runs.newest()


@fault("exception in the loader on one process")
def break_loader(runs):
    status, said = runs.strike("break loader", step=2)
    assert status == 1 and said.endswith("RuntimeError: the loader broke\n"), said
    return "its traceback is the last thing printed; --resume goes on", 3 - runs.newest()


@fault("NaN in the loss of one process")
def break_loss(runs):
    status, said = runs.strike("nan loss", step=3)
    assert status == 0 and "step 3: the loss of process 1 is not finite; skipped" in said, said
    log = [json.loads(line) for line in (runs.out / "log.jsonl").read_text().splitlines()]
    assert [entry["skipped_steps"] for entry in log if "skipped_steps" in entry] == [0, 0, 1, 1]
    return "both skip the step, which is counted", 1


@fault("one process hangs (SIGSTOP)")
def hang(runs):
    fault = {"what": "SIGSTOP", "step": 3, "rank": 1}
    status, said = runs.run("--ddp_timeout", "10", fault=fault)
    assert status == 1 and "Timed out" in said.splitlines()[-1], said
    return "the others end it after --ddp_timeout; --resume goes on", 3 - runs.newest()


# Files


@fault("clips are removed")
def remove_clips(runs):
    data = shutil.copytree(runs.data.parent, runs.folder / "data")
    runs.data = data / runs.data.name
    status, said = runs.strike("remove clips", step=1, rank=0, paths=[str(data / f"{i}.wav") for i in range(4)])
    assert status == 0, said
    log = [json.loads(line) for line in (runs.out / "log.jsonl").read_text().splitlines()]
    assert len(losses(runs.out)) == STEPS and sum(entry.get("clips/replaced", 0) for entry in log) > 0
    return "their questions are replaced and counted", 0


@fault("the disk is full in a save")
def fill_disk(runs):
    """By the system's answer to a save's last operation; `test_room.py` fills a real one."""
    status, said = runs.strike("fill disk", step=3, rank=0)
    assert status == 1 and "checkpoint-4: not written (No space left on device)" in said, said
    assert not (runs.out / PARTIAL).exists()
    return "ends in a sentence, nothing torn is left; --resume goes on", 4 - runs.newest()


def torn(runs, name: str) -> tuple[str, int]:
    shutil.copytree(runs.whole, runs.out)
    file = runs.out / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-7])
    said = runs.resume()
    assert f"passed over: {runs.out}/checkpoint-4: incomplete, {name} is " in said, said
    return "passed over by name; --resume goes on from the one before", 4 - 2


for kind, name in (
    ("weights", "model.safetensors"), ("optimizer", "optimizer.pt"), ("trainer state", "trainer_state.json"),
    ("record", "resume.json"),
):  # fmt: skip
    fault(f"newest checkpoint's {kind} torn")(lambda runs, name=name: torn(runs, name))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills and stops processes as Linux does")
@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, whole, preloaded, small_model, questions, tmp_path):
    runs = Runs(tmp_path, preloaded, small_model, questions, whole)
    outcome, lost = FAULTS[name](runs)
    runs.assert_nothing_is_left()
    runs.assert_it_loads()
    if not (runs.out / "model.safetensors").exists():
        runs.resume()
    assert 0 <= lost <= SAVE_STEPS and not (lost and name.startswith(("SIGTERM to", "SIGINT")))
    OUTCOMES[name] = outcome, lost


def table(outcomes: dict[str, tuple[str, int]]) -> str:
    rows = [f"| {name} | {outcome} | {lost} |" for name, (outcome, lost) in outcomes.items()]
    return "\n".join(["| fault | outcome | steps lost |", "|---|---|---|", *rows])


@pytest.mark.slow
def test_the_table(capsys):
    with capsys.disabled():
        print("\n\n" + table(OUTCOMES), flush=True)
    written = (ROOT / "docs" / "FAULTS.md").read_text(encoding="utf-8").splitlines()
    assert all(row in written for row in table(OUTCOMES).splitlines())


def test_the_document_has_a_row_for_every_fault():
    lines = (ROOT / "docs" / "FAULTS.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert rows == ["fault", *FAULTS]
