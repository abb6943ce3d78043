"""run/launch.py and the shell around it, on real processes of small scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from running import environment

LAUNCH = ROOT / "src" / "run" / "launch.py"
PRELUDE = f"""
import atexit, os, signal, sys, time
sys.path.append({str(LAUNCH.parent)!r})
from launch import recorded
rank, restart = os.environ.get("RANK"), os.environ.get("RUN_RESTART")
def note(name, text=""):
    with open(name, "a") as file:
        file.write(text)
def wait_for(*names):
    deadline = time.monotonic() + 20
    while not all(map(os.path.exists, names)) and time.monotonic() < deadline:
        time.sleep(0.01)
"""
SAVES = """
def save(number, frame):
    note("got-" + rank, signal.Signals(number).name + " ")
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
note("ready-" + rank)
wait_for("end")
time.sleep(0.1)
note("saved-" + rank)
"""


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher on a script in an empty folder; its environment has no GPU and no settings but the given."""

    def start(script: str, *flags: str, before=(), launcher=(LAUNCH,), **variables) -> subprocess.Popen:
        (tmp_path / "script.py").write_text(PRELUDE + script)
        command = [*before, sys.executable, *launcher, "script.py", *flags]
        return subprocess.Popen(
            list(map(str, command)), cwd=tmp_path, env=environment(**{"CONFIG": "", "GPU_NUM": 2, **variables}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        )  # fmt: skip

    return start


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """The exit status and the output."""
    output = process.communicate(timeout=30)[0]
    return process.returncode, output


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.01)


@pytest.mark.parametrize(
    "script",
    [
        "with recorded(): sys.exit('no folder x')",
        "with recorded(): sys.exit('no folder x') if rank == '1' else time.sleep(60)",
        "atexit.register(os.abort)\nwith recorded(): sys.exit('no folder x')",  # as with an open process group
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_mistake_of_the_user_is_printed_once(launch, script, processes):
    status, output = ended(launch(script.replace("'1'", f"'{processes - 1}'"), GPU_NUM=processes, RESTARTS=1))
    assert (status, output) == (2, "no folder x\n")


def test_mistake_without_launcher_is_printed_by_the_process(launch):
    assert ended(launch("with recorded(): sys.exit('no folder x')", GPU_NUM=1)) == (2, "no folder x\n")
    assert ended(launch("with recorded(): sys.exit(3)", GPU_NUM=1)) == (3, "")


def test_first_traceback_is_repeated_last(launch):
    script = """
with recorded():
    if rank == "1":
        atexit.register(time.sleep, 0.2)  # the process that fails first ends last
        atexit.register(note, "broken")
        raise RuntimeError("the cause")
    wait_for("broken")
    raise ConnectionError("the consequence")
"""
    status, output = ended(launch(script))
    assert status == 1 and output.splitlines()[-1] == "RuntimeError: the cause"
    assert output.count("the cause\n") == 2 and output.count("the consequence\n") == 1


def test_killed_process_stops_the_others(launch, tmp_path):
    script = """
if rank == "1":
    wait_for("ready-0")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    status, output = ended(launch(script + SAVES.replace('"end"', '"got-0"')))
    assert status == 128 + signal.SIGKILL and "process 1" in output and "SIGKILL" in output
    assert (tmp_path / "got-0").read_text() == "SIGTERM " and (tmp_path / "saved-0").exists()


def test_process_that_does_not_stop_is_killed_with_its_children(launch):
    script = """
if rank == "1":
    wait_for("child")
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not os.fork():
    note("child", "started")
time.sleep(60)
"""
    impatient = f"import sys; sys.path.insert(0, {str(LAUNCH.parent)!r}); import launch; launch.GRACE = 0.1; "
    launcher = launch(script, launcher=("-c", impatient + "sys.exit(launch.main())"))
    assert ended(launcher) == (3, ""), "the child would keep the output open"


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_forwarded_once_and_waited_for(launch, tmp_path, name):
    launcher = launch(SAVES, RESTARTS=1)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    os.killpg(launcher.pid, getattr(signal, name))  # as a terminal does
    for rank in range(2):
        wait_until(lambda path=tmp_path / f"got-{rank}": path.exists() and path.read_text() == f"{name} ")
    (tmp_path / "end").touch()
    assert ended(launcher) == (0, "")
    for rank in range(2):
        assert (tmp_path / f"got-{rank}").read_text() == f"{name} " and (tmp_path / f"saved-{rank}").exists()


def test_a_second_signal_ends_all_processes_without_saving(launch, tmp_path):
    launcher = launch(SAVES, RESTARTS=1)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "got-0", tmp_path / "got-1")
    launcher.send_signal(signal.SIGINT)
    assert ended(launcher)[0] == 128 + signal.SIGKILL
    assert not list(tmp_path.glob("saved-*"))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_signal_before_the_handlers_ends_the_run_without_restart(launch, tmp_path):
    launcher = launch("note(f'ready-{rank}-{restart}'); time.sleep(60)", RESTARTS=1)
    wait_for(tmp_path / "ready-0-0", tmp_path / "ready-1-0")
    launcher.terminate()
    assert ended(launcher) == (128 + signal.SIGTERM, "")
    assert not (tmp_path / "ready-0-1").exists()


def test_hangup_saves(launch, tmp_path):
    launcher = launch(SAVES)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGHUP)
    wait_for(tmp_path / "got-0", tmp_path / "got-1")
    launcher.send_signal(signal.SIGHUP)
    (tmp_path / "end").touch()
    assert ended(launcher)[0] == 0
    assert (tmp_path / "got-0").read_text() == (tmp_path / "got-1").read_text() == "SIGTERM "


def test_hangup_is_ignored_under_nohup(launch, tmp_path):
    launcher = launch(SAVES, before=["nohup"])
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGHUP)
    (tmp_path / "end").touch()
    assert ended(launcher)[0] == 0
    assert (tmp_path / "saved-0").exists() and not (tmp_path / "got-0").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not signal a process when its parent dies")
def test_no_process_outlives_a_killed_launcher(launch, tmp_path):
    launcher = launch(
        "note('pid-' + rank + '.partial', str(os.getpid()))\nos.rename('pid-' + rank + '.partial', 'pid-' + rank); time.sleep(60)"
    )
    wait_for(tmp_path / "pid-0", tmp_path / "pid-1")
    processes = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: not any(map(alive, processes)))


@pytest.mark.parametrize(("failures", "status"), [(1, 0), (2, 0), (3, 7)])
def test_failed_run_is_restarted(launch, tmp_path, failures, status):
    script = f"""
note(f"start-{{rank}}", os.environ["MASTER_PORT"] + " ")
note(f"{{rank}}-{{restart}}")
wait_for(f"0-{{restart}}", f"1-{{restart}}")
sys.exit(7 * (int(restart) < {failures}))
"""
    returned, output = ended(launch(script, RESTARTS=2))
    restarts = min(failures, 2)
    assert returned == status and output.count("restart") == restarts
    for rank in range(2):
        ports = (tmp_path / f"start-{rank}").read_text().split()
        assert len(ports) == len(set(ports)) == restarts + 1
    assert (tmp_path / "start-0").read_text() == (tmp_path / "start-1").read_text()


def test_single_process_is_wrapped_only_if_needed(launch):
    script = "print(os.getpid(), rank)"
    plain = launch(script, GPU_NUM=1)
    assert ended(plain) == (0, f"{plain.pid} None\n")
    for needed in (dict(RESTARTS=1), dict(CONFIG="script.py"), dict(NODE_NUM=2, MASTER_ADDR="node0")):
        wrapped = launch(script, GPU_NUM=1, **needed)
        status, output = ended(wrapped)
        assert status == 0 and output.split()[1] == "0" and output.split()[0] != str(wrapped.pid)


NAMES = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT RUN_RESTART"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(MASTER_PORT=5), {"0 0 2 2 0 127.0.0.1 5 0", "1 1 2 2 0 127.0.0.1 5 0"}),
        (
            dict(NODE_NUM=3, NODE_RANK=2, MASTER_ADDR="node0"),
            {"4 0 6 2 2 node0 32777 0", "5 1 6 2 2 node0 32777 0"},
        ),
    ],
)
def test_processes_get_their_place(launch, given, expected):
    script = f"os.write(1, (' '.join(map(os.environ.get, '{NAMES}'.split())) + chr(10)).encode())"
    status, output = ended(launch(script, **given))
    assert status == 0 and set(output.splitlines()) == expected


@pytest.mark.parametrize(
    ("flags", "given", "engine"),
    [
        ([], {}, "conf/ds_zero2.json"),
        (["--use_cpu", "false"], {}, "conf/ds_zero2.json"),
        (["--use_cpu"], {}, None),
        (["--use_cpu=true"], {}, None),
        (["--use-cpu", "True"], {}, None),
        (["--beta", "0", "--use_cpu", "true", "--run_name", "two words"], {}, None),
        (["--use_cpu", "true"], {"CONFIG": "conf/ds_zero3.json"}, "conf/ds_zero3.json"),
        ([], {"CONFIG": ""}, None),
    ],
)
def test_engine_is_chosen_by_flags_and_config(launch, tmp_path, flags, given, engine):
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    launcher = launch("print(sys.argv[1:])", *flags, **{"GPU_NUM": 1, "CONFIG": "", **given})
    if "CONFIG" not in given:
        launcher.communicate()
        variables = environment(GPU_NUM=1)
        variables.pop("CONFIG", None)
        launcher = subprocess.Popen(launcher.args, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True)
    assert ended(launcher) == (0, f"{(['--deepspeed', engine] if engine else []) + flags}\n")


@pytest.mark.parametrize("flags", [["--deepspeed", "x.json"], ["--deepspeed=x.json"]], ids=" ".join)
def test_deepspeed_on_one_process_gets_its_place(launch, flags):
    status, output = ended(launch("print(os.environ.get('RANK'))", *flags, GPU_NUM=1, CONFIG=""))
    assert status == 0 and output == "0\n"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("GPU_NUM", {"GPU_NUM": "x"}),
        ("GPU_NUM", {"GPU_NUM": "0"}),
        ("NODE_NUM", {"NODE_NUM": "-1"}),
        ("NODE_RANK", {"NODE_NUM": "2", "NODE_RANK": "2"}),
        ("MASTER_ADDR", {"NODE_NUM": "2"}),
        ("MASTER_PORT", {"MASTER_PORT": "70000"}),
        ("RESTARTS", {"RESTARTS": "often"}),
        ("CONFIG", {"CONFIG": "conf/gone.json"}),
    ],
)
def test_wrong_value_is_refused_by_name(launch, name, given):
    status, output = ended(launch("print('started')", **given))
    assert status == 2 and output.count("\n") == 1 and name in output


@pytest.mark.parametrize(
    ("gpus", "flags", "status", "started"), [(3, [], 0, 3), (0, [], 2, 0), (0, ["--use_cpu"], 0, 1)]
)
def test_processes_are_as_many_as_gpus(launch, tmp_path, gpus, flags, status, started):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "torch.py").write_text(f"class cuda:\n    device_count = lambda: {gpus}\n")
    launcher = launch("os.write(1, b'started\\n')", *flags, GPU_NUM="", PYTHONPATH=tmp_path / "modules")
    returned, output = ended(launcher)
    assert returned == status and output.count("started\n") == started
    assert started or ("--use_cpu" in output and output.count("\n") == 1)


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
    shell = subprocess.run(
        ["sh", "repository/run.sh"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"} | given, capture_output=True, text=True
    )
    assert shell.stdout.splitlines() == [means.format(here=tmp_path), str(tmp_path / "repository")], shell.stderr


def test_paths_inside_the_repository_stay_relative(tmp_path):
    (tmp_path / "paths.sh").write_text((ROOT / "paths.sh").read_text())
    (tmp_path / "run.sh").write_text('. "$(dirname "$0")/paths.sh"\necho "$OUT_DIR $MMAU_DIR"\n')
    variables = {"PATH": "/usr/bin:/bin", "OUT_DIR": "exp/x", "MMAU_DIR": "-d"}
    shell = subprocess.run(["sh", "run.sh"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert shell.stdout == "exp/x ./-d\n"


def test_launch_sh_puts_the_users_flags_last(tmp_path):
    (tmp_path / "setup_env.sh").write_text("PYTHON=echo\n")
    (tmp_path / "launch.sh").write_text((ROOT / "launch.sh").read_text())
    variables = {"PATH": "/usr/bin:/bin", "SCRIPT": "script.py", "OUT_DIR": "o u t", "PROMPT_STYLE": "answer"}
    command = ["sh", "-euc", ". ./launch.sh", "sh", "--output_dir", "x y"]
    shell = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    words = "src/run/launch.py script.py --model_name_or_path Qwen/Qwen2-Audio-7B-Instruct "
    words += "--data_file data/AVQA/train_qa.data --output_dir o u t --prompt_style answer --output_dir x y\n"
    assert shell.stdout == words, shell.stderr


@pytest.mark.parametrize(
    ("flags", "seed"),
    [([], "1"), (["--seed", "5"], "5"), (["--seed=6"], "6"), (["--seed=6", "--beta", "--seed", "7"], "7")],
)
def test_seed_of_the_demo_decides_its_data(tmp_path, flags, seed):
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\ncase $1 in demo/make_demo.py) echo "$@" > {tmp_path}/called; exit 7 ;; esac\n')
    stub.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VIRTUAL_ENV": str(tmp_path)}
    shell = subprocess.run(["sh", ROOT / "run_grpo.sh", "demo", *flags], env=variables, capture_output=True, text=True)
    assert shell.returncode == 7, shell.stderr
    assert (tmp_path / "called").read_text().split()[-2:] == ["--seed", seed]
