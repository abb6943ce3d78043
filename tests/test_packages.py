"""launch/packages.py: what a flag needs beside the requirements is named, with the command, by the launcher already."""

import sys

import pytest
from transformers import trainer_optimizer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from launch import packages, preflight
from launch.packages import NEEDED, find_missing_packages

BUILT_IN = (  # of torch, transformers, and torch's builds for other devices
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "sgd", "adagrad", "rmsprop",
)  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    """The modules that are there, as a set that a test fills."""
    there = set()
    monkeypatch.setattr(packages, "find_spec", lambda name: name if name in there else None)
    return there


def test_each_flag_names_its_package_and_the_command(installed):
    settings = {
        "report_to": ["wandb", "tensorboard", "none"], "optim": OptimizerNames.PAGED_ADAMW_8BIT, "use_liger_kernel": True,
        "load_in_4bit": True, "load_in_8bit": False, "beta": 0.04,
    }  # fmt: skip
    assert [problem.partition(" needs")[0] for problem in find_missing_packages(settings)] == [
        "--report_to wandb:", "--report_to tensorboard:", "--optim paged_adamw_8bit:", "--use_liger_kernel true:",
        "--load_in_4bit true:",
    ]  # fmt: skip
    wandb, *_, bits = find_missing_packages(settings)
    assert wandb == "--report_to wandb: needs the package wandb, which is not installed; python -m pip install wandb"
    assert bits.endswith("the package bitsandbytes, which is not installed; python -m pip install bitsandbytes==0.50.2")
    installed |= {"wandb", "tensorboardX", "bitsandbytes", "liger_kernel"}
    assert find_missing_packages(settings) == []
    assert find_missing_packages({"report_to": "none", "optim": "adamw_torch"}) == []


def test_every_optimizer_and_reporter_of_transformers_is_known():
    names = {name.value for name in OptimizerNames}
    assert names == {*NEEDED["optim"], *BUILT_IN} and not set(BUILT_IN) & set(NEEDED["optim"])
    assert {name.value for name in trainer_optimizer._BITSANDBYTES_OPTIMIZERS} == {
        name for name, package in NEEDED["optim"].items() if package == packages.BITSANDBYTES
    }
    assert set(INTEGRATION_TO_CALLBACK) == {*NEEDED["report_to"], "kubeflow"}, "which is told by its environment"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--use_wandb",), "--report_to wandb: needs the package wandb"),
        (("--report-to", "tensorboard", "trackio"), "pip install tensorboard\n  --report_to trackio: needs"),
        (("--load_in_4bit", "true"), "--load_in_4bit true: needs the package bitsandbytes"),
        (("--use_vllm", "true"), "--use_vllm true: needs the package vllm, .*; sh setup_vllm.sh makes"),
        (("--load_in_4bit", "false", "--optim", "lion_8bit"), "--optim lion_8bit: needs the package bitsandbytes"),
    ],
)
def test_the_launcher_says_it_before_any_process_is_started(
    installed, small_model, questions, monkeypatch, capsys, flags, message
):
    places = ("--use_cpu", "true", "--model_name_or_path", small_model, "--data_file", questions)
    monkeypatch.setattr(sys, "argv", ["preflight.py", "src/train.py", *map(str, places), *flags])
    with pytest.raises(SystemExit, match=message):
        preflight.main()
    installed |= {"wandb", "tensorboard", "trackio", "bitsandbytes", "vllm"}
    preflight.main()
    assert capsys.readouterr().out == "1\n"
