"""launch/start.py and paths.sh: what a launcher's user sees of a failure, and whose paths are meant."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

START = [sys.executable, ROOT / "src" / "launch" / "start.py", "--standalone", "--nproc_per_node"]
SCRIPT = """
import os, signal, sys, time
what, rank = sys.argv[1], os.environ.get("RANK", "alone")
if what == "mistake":
    sys.exit("script: there is no folder x") if rank in ("1", "alone") else time.sleep(60)
elif what == "crash" and rank == "1":
    raise RuntimeError("rank 1 broke")
elif what == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "interrupted":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    there = os.path.join(os.path.dirname(__file__), "there")
    rank == "1" and open(there, "w").close()
    while not os.path.exists(there):  # before it, the other would answer with Python's own traceback
        time.sleep(0.05)
    rank == "0" and os.killpg(os.getpgid(os.getppid()), signal.SIGINT)  # as a terminal does
elif what == "status":
    sys.exit(3)
elif what == "signal":
    def end(number, frame):
        time.sleep(0.5)  # what a save takes
        os.write(1, b"saved\\n")  # at once, since two processes write
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    os.write(1, b"ready\\n")
time.sleep(60)
"""


def start(processes, *arguments, tmp_path) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [*START, processes, tmp_path / "script.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, start_new_session=True)


@pytest.mark.parametrize(
    ("processes", "what", "status", "last"),
    [
        ("2", "mistake", 1, "script: there is no folder x"),
        ("2", "crash", 1, "RuntimeError: rank 1 broke"),
        (
            "2",
            "killed",
            137,
            "process 1 was ended by SIGKILL: out of memory, if nobody sent it; the others were stopped",
        ),
        ("2", "status", 3, None),
        ("2", "interrupted", 130, None),
        ("1", "mistake", 1, "script: there is no folder x"),
        ("x", "status", 1, "GPU_NUM is 'x'; it must be the number of processes, from 1 on"),
    ],
)
def test_what_a_process_says_is_the_last_thing_printed(tmp_path, processes, what, status, last):
    run = start(processes, what, tmp_path=tmp_path)
    said = run.stderr.splitlines()
    assert run.returncode == status and said[-1:] == ([last] if last else []), run.stderr
    assert "ChildFailedError" not in run.stderr and len(said) < 12


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_is_handed_on_and_what_the_processes_make_of_it_counts(tmp_path, number):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [*START, "2", tmp_path / "script.py", "signal"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for _ in range(2):
            assert run.stdout.readline() == "ready\n"
        run.send_signal(number)
        assert run.communicate(timeout=60)[0] == "saved\nsaved\n"
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({"OUT_DIR": "-rel"}, "OUT_DIR={here}/./-rel"),
        ({"OUT_DIR": "exp/x", "DATA_FILE": "/abs/d"}, "OUT_DIR={here}/exp/x DATA_FILE=/abs/d"),
        ({"MODEL_NP": "there", "CONFIG": "conf/ds_zero3.json"}, "MODEL_NP={here}/there CONFIG=conf/ds_zero3.json"),
        ({"MODEL_NP": "Qwen/Qwen2-Audio-7B-Instruct", "CONFIG": ""}, "MODEL_NP=Qwen/Qwen2-Audio-7B-Instruct CONFIG="),
    ],
)
def test_paths_are_those_of_the_users_folder(tmp_path, given, means):
    (tmp_path / "repository").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "repository" / "paths.sh").write_text((ROOT / "paths.sh").read_text())
    names = " ".join(f"{name}=${name}" for name in given)
    launcher = f'set -eu\n. "$(dirname "$0")/paths.sh"\necho "{names}"\npwd\n'
    (tmp_path / "repository" / "run.sh").write_text(launcher)
    said = subprocess.run(
        ["sh", "repository/run.sh"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"} | given, capture_output=True, text=True
    )
    assert said.stdout.splitlines() == [means.format(here=tmp_path), str(tmp_path / "repository")], said.stderr


def test_inside_the_repository_paths_stay_as_they_are(tmp_path):
    (tmp_path / "paths.sh").write_text((ROOT / "paths.sh").read_text())
    (tmp_path / "run.sh").write_text('. "$(dirname "$0")/paths.sh"\necho "$OUT_DIR $MMAU_DIR"\n')
    environment = {"PATH": "/usr/bin:/bin", "OUT_DIR": "exp/x", "MMAU_DIR": "-d"}
    said = subprocess.run(["sh", "run.sh"], cwd=Path(tmp_path), env=environment, capture_output=True, text=True)
    assert said.stdout == "exp/x ./-d\n"


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({}, "--standalone"),
        ({"MASTER_PORT": "5"}, "--node_rank 0 --master_addr 127.0.0.1 --master_port 5"),
        ({"NODE_NUM": "2", "NODE_RANK": "1"}, "--node_rank 1 --master_addr 127.0.0.1 --master_port 32777"),
        ({"NODE_NUM": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}, "--node_rank 0 --master_addr a --master_port 7"),
    ],
)
def test_a_port_is_agreed_on_by_several_nodes_alone(tmp_path, given, flags):
    (tmp_path / "setup_env.sh").write_text("PYTHON=echo\n")
    (tmp_path / "launch.sh").write_text((ROOT / "launch.sh").read_text())
    places = {"SCRIPT": "script.py", "OUT_DIR": "out", "PROMPT_STYLE": "answer", "GPU_NUM": "2", "CONFIG": ""}
    said = subprocess.run(
        ["sh", "-euc", ". ./launch.sh"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"} | places | given,
        capture_output=True, text=True,
    )  # fmt: skip
    nodes = given.get("NODE_NUM", "1")
    start = f"src/launch/start.py --nproc_per_node 2 --nnodes {nodes} {flags} script.py --model_name_or_path"
    assert said.stdout.startswith(start), said.stdout + said.stderr
