"""launch/start.py and paths.sh: what a launcher's user sees of a failure, and whose paths are meant."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from running import environment, free_port

pytestmark = pytest.mark.measured
ELSEWHERE = "a process on another node failed, see there; those on this node were stopped"
START = [sys.executable, ROOT / "src" / "launch" / "start.py", "--standalone", "--nproc_per_node"]
SCRIPT = (
    f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})"
    + """
import atexit, os, signal, sys, time
from launch.failures import recorded, stop_without_launcher
tried = os.environ.get("TORCHELASTIC_RESTART_COUNT")
here = os.path.dirname(__file__)
def wait_for(name):
    while not os.path.exists(os.path.join(here, name)):
        time.sleep(0.05)
def note(name):
    open(os.path.join(here, name), "w").close()
what, rank = sys.argv[1], os.environ.get("RANK", "alone")
only = "0" if os.environ.get("WORLD_SIZE") == "1" else None
if what.startswith("mistake of all"):
    if what.endswith("aborting"):  # as processes do now and then that exit with their group open
        atexit.register(os.abort)
    with recorded():
        sys.exit("script: there is no folder x")
elif what == "mistake":
    with recorded():
        sys.exit("script: there is no folder x") if rank in ("1", "alone", only) else time.sleep(60)
elif what == "crash" and rank == "1":
    raise RuntimeError("rank 1 broke")
elif what == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "interrupted":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rank == "1" and note("there")
    wait_for("there")  # before it, the other would answer with Python's own traceback
    rank == "0" and os.killpg(os.getpgid(os.getppid()), signal.SIGINT)  # as a terminal does
elif what == "consequence":
    with recorded():
        if rank == "1":
            atexit.register(time.sleep, 2)  # what taking down a group of processes may take
            atexit.register(note, "broken")
            raise RuntimeError("rank 1 broke")
        wait_for("broken")
        raise ConnectionError("rank 1 is gone")
elif what == "failing once":
    import torch
    torch.distributed.init_process_group("gloo")  # where the processes of this start are, not of the first
    rank == "0" and tried == "0" and os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()
    os.write(1, f"process {rank}, start 2\\n".encode())
    sys.exit(0)
elif what == "failing again":
    os.write(2, b"tried\\n") if rank == "1" else time.sleep(60)
    raise RuntimeError("rank 1 broke")
elif what == "orphan":
    stop_without_launcher()
    signal.signal(signal.SIGTERM, lambda *_: (note("saved " + rank), os._exit(0)))
    os.write(1, b"ready\\n")
elif what == "signal in a restart":
    rank == "0" and tried == "0" and os.kill(os.getpid(), signal.SIGKILL)
    tried == "1" and os.write(1, b"ready\\n")
elif what == "launcher killed":
    rank == "1" and note("started")
    wait_for("started")
    rank == "0" and (os.kill(os.getppid(), signal.SIGKILL), os._exit(0))
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
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def start(processes, *arguments, tmp_path) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [*START, processes, tmp_path / "script.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, start_new_session=True)


@pytest.mark.parametrize(
    ("processes", "what", "status", "last"),
    [
        ("2", "mistake", 1, "script: there is no folder x"),
        slow("2", "mistake of all", 1, "script: there is no folder x"),
        ("2", "mistake of all, aborting", 1, "script: there is no folder x"),
        slow("2", "crash", 1, "RuntimeError: rank 1 broke"),
        slow("2", "consequence", 1, "RuntimeError: rank 1 broke"),
        (
            "2",
            "killed",
            137,
            "process 1 was ended by SIGKILL: out of memory, if nobody sent it; the others were stopped",
        ),
        slow("2", "status", 3, None),
        slow("2", "interrupted", 130, None),
        ("1", "mistake", 1, "script: there is no folder x"),
        slow("x", "status", 1, "GPU_NUM is 'x'; it must be the number of processes, from 1 on"),
    ],
)
def test_what_a_process_says_is_the_last_thing_printed(tmp_path, processes, what, status, last):
    run = start(processes, what, tmp_path=tmp_path)
    said = run.stderr.splitlines()
    assert run.returncode == status and said[-1:] == ([last] if last else []), run.stderr
    assert "ChildFailedError" not in run.stderr and len(said) < (30 if what == "consequence" else 12)
    assert not what.startswith("mistake") or said.count(last) == 1, "once for all processes"
    assert ("process 1 failed first:" in said) == (what == "consequence")


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


def restart(*arguments, tmp_path, processes=2) -> subprocess.Popen:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [*START, processes, "--max_restarts", "2", tmp_path / "script.py", *arguments]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_processes_are_started_again_after_a_failure(tmp_path):
    with restart("failing once", tmp_path=tmp_path) as run:
        said = run.communicate(timeout=100)[0]
    assert run.returncode == 0, said
    assert "process 0 was ended by SIGKILL: out of memory, if nobody sent it; the others were stopped" in said
    assert said.count("restart 1 of 2\n") == 1 and "process 0, start 2" in said and "process 1, start 2" in said


@pytest.mark.slow
def test_restarts_are_counted_and_the_last_error_stays(tmp_path):
    with restart("failing again", tmp_path=tmp_path) as run:
        said = run.communicate(timeout=100)[0]
    assert run.returncode == 1 and said.count("tried\n") == 3
    assert said.endswith("RuntimeError: rank 1 broke\n"), said


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_is_not_tried_again(tmp_path, processes):
    what = "mistake"
    with restart(what, tmp_path=tmp_path, processes=processes) as run:
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 1 and said == "script: there is no folder x\n"


@pytest.mark.slow
def test_a_signal_during_a_restart_ends_all(tmp_path):
    with restart("signal in a restart", tmp_path=tmp_path) as run:
        while (line := run.stdout.readline()) != "ready\n":
            assert line, "ended by itself"
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + signal.SIGTERM and "restart 2" not in said, said


@pytest.mark.slow
def test_a_node_that_waits_for_the_others_can_be_stopped(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    place = ("--nnodes", "2", "--node_rank", "1", "--master_addr", "127.0.0.1", "--master_port", free_port())
    command = [*START[:2], "--nproc_per_node", "1", *place, tmp_path / "script.py", "status"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr.readline() == f"node 1 of 2: waits for the others at 127.0.0.1:{place[-1]}\n"
        time.sleep(1)
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=20)
    assert run.returncode == 128 + signal.SIGTERM


def start_nodes(preloaded, tmp_path, what: str, nodes=(0, 1), port: int | None = None) -> list[tuple[int, str]]:
    """Nodes of one process each: exit status and last line of each."""
    (tmp_path / "script.py").write_text(SCRIPT)
    place = ["--master_addr", "127.0.0.1", "--master_port", str(port or free_port())]
    runs = [
        subprocess.Popen(
            ["python", START[1], "--nproc_per_node", "1", "--nnodes", "2", "--node_rank", str(node), *place,
             tmp_path / "script.py", what],
            env=environment(PRELOADED=preloaded), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in nodes
    ]  # fmt: skip
    said = [run.communicate(timeout=60)[0].splitlines() for run in runs]
    return [(run.returncode, lines[-1]) for run, lines in zip(runs, said, strict=True)]


@pytest.mark.slow
def test_a_node_whose_process_is_well_says_that_another_nodes_failed(preloaded, tmp_path):
    ended = start_nodes(preloaded, tmp_path, "mistake")
    assert ended == [(1, ELSEWHERE), (1, "script: there is no folder x")]


@pytest.mark.slow
def test_a_node_is_told_by_the_loss_of_the_first_one_too(preloaded, tmp_path):
    first, second = start_nodes(preloaded, tmp_path, "launcher killed")  # and with it what the nodes agree by
    assert first[0] == -signal.SIGKILL and second == (1, ELSEWHERE)


@pytest.mark.slow
def test_nodes_that_cannot_meet_say_where_they_tried(preloaded, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ((status, line),) = start_nodes(preloaded, tmp_path, "status", nodes=[0], port=port)
    assert status == 1 and line.startswith(f"the nodes did not meet at 127.0.0.1:{port}; MASTER_ADDR and MASTER_PORT ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's death")
def test_processes_whose_launcher_is_killed_are_told(tmp_path):
    with restart("orphan", tmp_path=tmp_path) as run:
        for _ in range(2):
            assert run.stdout.readline() == "ready\n"
        run.kill()
    for rank in range(2):
        deadline = time.monotonic() + 20
        while not (tmp_path / f"saved {rank}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


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
        ({"RESTARTS": "3"}, "--standalone"),
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
    again = f"--max_restarts {given.get('RESTARTS', 0)}"
    start = f"src/launch/start.py --nproc_per_node 2 --nnodes {nodes} {again} {flags} script.py --model_name_or_path"
    assert said.stdout.startswith(start), said.stdout + said.stderr
