"""launch/preflight.py: the whole command line is parsed before processes are started, as for all of them; and the
launchers hand on what they are given as it is, whatever its characters."""

import importlib
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments

from conftest import ROOT
from launch import preflight


@pytest.fixture
def start(monkeypatch, small_model, questions, tmp_path):
    """Runs preflight's main as launch.sh does, with further flags; variables are restored afterwards."""

    def main(*flags: str, script: str = "src/train.py", **variables) -> None:
        for name in ("_setup_devices", "world_size"):
            monkeypatch.setattr(TrainingArguments, name, TrainingArguments.__dict__[name])
        for name in (*preflight.COUNTS, "WORLD_SIZE"):
            monkeypatch.setenv(name, variables.get(name, ""))
        places = ["--model_name_or_path", small_model, "--data_file", questions, "--output_dir", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["preflight.py", script, "--use_cpu", "true", *map(str, places), *flags])
        preflight.main()

    return main


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--questions_per_step 15", "train.py: 15 questions per step cannot be split evenly over 2 processes"),
        ("--generation_batch_size 8", "train.py: .*must be divisible by the global batch size .16."),
        ("--sync_ref_model true --beta 0", "train.py: --sync_ref_model true with --beta 0"),
        ("--num_generations 1", "train.py: --num_generations 1: expected 2 or more"),
        ("--auto_find_batch_size true", "train.py: auto_find_batch_size is not supported"),
    ],
)
def test_what_cannot_run_on_all_processes_is_said_before_any_is_started(start, line, said):
    with pytest.raises(SystemExit, match=said):
        start(*line.split(), GPU_NUM="2")
    assert not torch.distributed.is_initialized()


def test_wrong_flags_are_said_by_the_scripts_name(start, capsys):
    with pytest.raises(SystemExit):
        start("--max_step", "5", "--deepspeed", "conf/ds_zero2.json")
    assert capsys.readouterr().err.startswith("train.py: there is no flag --max_step; did you mean --max_steps?")
    with pytest.raises(SystemExit):
        start("--beta", "1", script="src/train_sft.py", GPU_NUM="2")
    assert capsys.readouterr().err.startswith("train_sft.py: there is no flag --beta")


def test_what_can_run_is_started(start, capsys, tmp_path):
    start("--deepspeed", "conf/ds_zero3.json", GPU_NUM="4", NODE_NUM="2")
    start("--config_path", "conf/ds_zero2.json", "--prompt_style", "choice", script="src/train_sft.py")
    assert capsys.readouterr().out == "1\n1\n"
    assert not torch.distributed.is_initialized() and not (tmp_path / "out").exists()


def test_a_single_process_parses_once(start, capsys, monkeypatch):
    start("--no_flag_at_all")  # the script itself will say it
    assert capsys.readouterr().out == "1\n"
    monkeypatch.setattr(preflight, "check_flags", lambda script, arguments, processes: print("parsed for", processes))
    start(GPU_NUM="4", NODE_NUM="2")
    start(MASTER_PORT="29500")
    assert capsys.readouterr().out == "parsed for 8\n1\nparsed for 1\n1\n"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"GPU_NUM": "0"}, "GPU_NUM: is '0'; a whole number from 1 on is needed"),
        ({"GPU_NUM": "x", "NODE_RANK": "-1"}, "GPU_NUM: is 'x'.*\n.*NODE_RANK: is '-1'"),
        ({"MASTER_PORT": "http", "NODE_NUM": "2"}, "MASTER_PORT: is 'http'"),
    ],
)
def test_variables_that_count_nothing(start, variables, said):
    with pytest.raises(SystemExit, match=said):
        start(**variables)


def test_an_engine_file_that_is_no_json(start, tmp_path):
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(SystemExit, match=r"engine: .*engine\.json, line 1: not JSON"):
        start("--deepspeed", str(tmp_path / "engine.json"))


def test_an_engine_that_is_not_there(start, monkeypatch):
    with pytest.raises(SystemExit, match=r"engine: there is no file conf/ds_zero9\.json; CONFIG names one of conf/"):
        start("--deepspeed", "conf/ds_zero9.json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="engine: DeepSpeed is not installed .*; an empty CONFIG trains without it"):
        start("--deepspeed", "conf/ds_zero2.json")


def test_all_that_is_missing_is_said_at_once(start, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        start("--use_cpu", "false", "--model_name_or_path", "./gone", "--data_file", "gone.jsonl")
    title, *said, demo = str(ended.value).split("\n  ")
    assert title == "This run cannot start:" and demo == preflight.DEMO
    assert [line.partition(":")[0] for line in said] == ["model", "data", "GPU"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(SystemExit, match="train.py: 16 questions per step cannot be split evenly over 3 processes"):
        start("--use_cpu", "false", "--questions_per_step", "16")


STUB = r"""#!/bin/sh
# Stands for python: writes down what it was called with, and prints the number of GPUs.
for WORD in "$@"; do printf '<%s>\n' "$WORD"; done >> "$CALLS"
case $1 in *preflight.py | -c) echo 1 ;; esac
"""


@pytest.mark.parametrize("launcher", ["run_grpo.sh", "run_sft.sh", "test_mmau.sh", "run_grpo.sh demo"])
def test_variables_reach_the_scripts_as_they_are(tmp_path, launcher):
    """Spaces, quotes and what a shell would execute or expand, in every variable and flag."""
    name, *words = launcher.split()
    strange = """a b"c'd$(touch marker)`touch marker`;touch marker *"""
    folder = tmp_path / f"repository {strange}"
    folder.mkdir()
    for path in ROOT.glob("*.sh"):
        shutil.copy(path, folder)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)
    out, data, model = (f"{tmp_path}/{kind} {strange}" for kind in ("out", "data", "model"))
    for path in (f"{out}/checkpoint-1", f"{out}/untrained"):
        os.makedirs(path)
    done = subprocess.run(
        ["sh", folder / name, *words, "--run_name", strange],
        env={
            "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "VIRTUAL_ENV": "x", "CALLS": str(tmp_path / "calls"),
            "OUT_DIR": out, "DATA_FILE": data, "MODEL_NP": model, "MMAU_DIR": data, "STEPS": "all base", "CONFIG": f"c {strange}",
            "PROMPT_STYLE": strange,
        },
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "calls").read_text().splitlines()
    expected = [f"<{strange}>", f"<{out}>"] + ([] if words else [f"<{data}>"])
    assert set(expected) <= set(said), said
    assert all(strange in line for line in said if "touch" in line or "*" in line), "a value was cut or expanded"
    assert not list(tmp_path.rglob("marker"))
