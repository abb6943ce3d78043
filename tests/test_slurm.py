"""run_grpo.slurm on stubs of Slurm's commands: the environment of each node's launcher, and the path of a signal."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import ROOT

# srun starts its command once per node; scancel signals those.
STUBS = {
    "srun": """
        [ "$1" = --kill-on-bad-exit=1 ]; shift
        for node in 0 1; do SLURM_NODEID=$node "$@" & echo $! >> "$LOGS/started"; done
        for pid in $(cat "$LOGS/started"); do wait "$pid"; done""",
    "scontrol": """
        case $1 in
        show) [ "$*" = "show hostnames node[3-4]" ]; echo node3; echo node4 ;;
        requeue) echo "$2" > "$LOGS/requeued" ;;
        esac""",
    "scancel": '[ "$*" = "--signal=HUP 4242" ]; kill -HUP $(cat "$LOGS/started")',
    "squeue": 'cat "$LOGS/state"',
    # The launcher: it saves when it is signalled.
    "run_grpo.sh": """
        trap 'touch "$LOGS/saved-$NODE_RANK"; exit 0' HUP
        echo "$NODE_NUM $MASTER_ADDR $MASTER_PORT $RESTARTS $*" > "$LOGS/node-$NODE_RANK"
        if [ -f "$LOGS/stay" ]; then for i in 1 2 3 4 5 6 7 8; do sleep 0.5; done; fi
        exit "$(cat "$LOGS/status")" """,
}


@pytest.fixture
def job(tmp_path):
    """Starts the job in an empty folder; the stubs write to `logs` there."""
    logs = tmp_path / "logs"
    logs.mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        path = tmp_path / ("" if name.endswith(".sh") else "bin") / name
        path.write_text(f"#!/bin/sh\nset -eu\n{text}\n")
        path.chmod(0o755)
    (logs / "status").write_text("0")
    (logs / "state").write_text("RUNNING\n")
    shutil.copy(ROOT / "run_grpo.slurm", tmp_path / "spooled")  # Slurm runs a copy of the script

    def start(*flags: str, **variables: str) -> subprocess.Popen:
        slurm = dict(SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node[3-4]", SLURM_JOB_ID="4242")
        environment = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin:/bin", "LOGS": str(logs)}
        environment |= slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)} | variables
        command = ["sh", tmp_path / "spooled", *flags]
        return subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        )  # fmt: skip

    return start


def test_each_node_gets_a_launcher(job, tmp_path):
    with job("--run_name", "two words") as run:
        assert run.wait(20) == 0, run.stderr.read()
    for node in (0, 1):
        assert (tmp_path / "logs" / f"node-{node}").read_text() == "2 node3 22420 3 --run_name two words\n"
    assert not (tmp_path / "logs" / "requeued").exists()


def test_requeued_job_resumes(job, tmp_path):
    said = tmp_path / "logs" / "node-1"
    with job(SLURM_RESTART_COUNT="1") as run:
        assert run.wait(20) == 0
    assert "--resume" not in said.read_text(), "there is no checkpoint"
    (tmp_path / "exp" / "model" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "logs" / "started").unlink()
    with job("--beta", "0", SLURM_RESTART_COUNT="1") as run:
        assert run.wait(20) == 0
    assert said.read_text().endswith(" --beta 0 --resume\n")


@pytest.mark.parametrize(("state", "again"), [("RUNNING", True), ("COMPLETING", False)])
def test_nodes_save_before_the_job_is_requeued(job, tmp_path, state, again):
    logs = tmp_path / "logs"
    (logs / "stay").touch()
    (logs / "state").write_text(f"{state}\n")
    with job() as run:
        wait_for(logs / "node-0", logs / "node-1")
        run.terminate()  # as `--signal=B:TERM@120` does
        assert run.wait(20) == 0
    assert (logs / "saved-0").exists() and (logs / "saved-1").exists()
    assert (logs / "requeued").exists() == again


def test_failure_is_the_status_of_the_job(job, tmp_path):
    (tmp_path / "logs" / "status").write_text("3")
    with job() as run:
        assert run.wait(20) == 3
    assert not (tmp_path / "logs" / "requeued").exists()


def test_wrong_folder_is_refused(job):
    with job(SLURM_SUBMIT_DIR="/") as run:
        assert run.wait(20) == 1 and "run_grpo.sh" in run.stderr.read()


def test_only_the_account_needs_editing():
    lines = (ROOT / "run_grpo.slurm").read_text().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert [line for line in directives if line.isupper() or line.endswith("=ACCOUNT")] == ["--account=ACCOUNT"]
    assert {"--signal=B:TERM@120", "--requeue", "--ntasks-per-node=1"} <= set(directives)
    assert subprocess.run([shutil.which("dash") or "sh", "-n", ROOT / "run_grpo.slurm"]).returncode == 0


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)
