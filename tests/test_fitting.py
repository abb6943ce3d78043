"""What a run's flags say of its memory, what is printed and refused before its model is loaded, and what is advised."""

import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

import startup
import train
import train_sft
from conftest import ROOT
from launch import packages
from trainer import fitting, memory
from trainer.fitting import _changes, advise, check_devices, read_settings, size
from trainer.memory import Estimate, Settings, estimate

SMALL = Settings(
    dtype=torch.float32, prompt=120, seconds=2, completion=8, generations=4, steps_per_generation=4, beta=0.1
)


@pytest.fixture(scope="module")
def config(small_model):
    return AutoConfig.from_pretrained(small_model)


@pytest.fixture(scope="module")
def found(config) -> Estimate:
    return estimate(config, SMALL)


@pytest.mark.slow
def test_a_gpu_that_is_too_small_is_refused_with_settings_that_fit(config, found):
    less = estimate(config, replace(SMALL, checkpointing=True))
    with pytest.raises(ValueError) as error:
        check_devices(config, SMALL, [("H100", found.total * 2), ("L4", int(less.total / 0.9))])
    said, title, *offers = str(error.value).splitlines()
    assert f"does not fit devices of {size(int(less.total / 0.9))}: it takes {size(found.total)} at most" in said
    assert title == "What would fit, with 8% to spare:"
    assert f"  --activation_checkpointing true: {size(less.total)}" in offers
    assert not any("--activation_checkpointing true --" in offer for offer in offers)  # it is enough
    with pytest.raises(ValueError, match="take larger devices"):
        check_devices(config, SMALL, [("L4", 1000)])


def test_what_only_lacks_the_reserve_is_left_to_the_probe(config, found, capsys):
    check_devices(config, SMALL, [("L4", found.total), ("H100", 2 * found.total), ("L4", found.total)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"memory of H100, {size(2 * found.total)} per process; calculated: {size(found.total)} at most"
    )
    assert second.startswith("memory of L4, ") and f"weights {size(found.weights)}" in second


def test_a_cpu_is_never_refused(config, capsys):
    check_devices(config, SMALL, [("CPU", 1000)])
    assert capsys.readouterr().out.startswith("memory of CPU, 0.0 MiB per process; calculated: ")


@pytest.mark.slow
def test_after_a_failure_only_what_takes_less_is_advised(config, found):
    """The device would be large enough by calculation, and yet was not."""
    offers = advise(config, found, 10 * found.total, than=0.9).splitlines()[1:]
    for offer in offers:
        assert "--" in offer or "CONFIG" in offer
    totals = {estimate(config, replace(SMALL, **change)).total for change in ({"checkpointing": True}, {"lora_r": 16})}
    assert any(size(total) in offer for total in totals if total < 0.9 * found.total for offer in offers)
    assert not any(offer.endswith(f": {size(found.total)}") for offer in offers)


def test_a_reference_is_advised_to_wait_where_it_can(config, found):
    waiting = estimate(config, replace(SMALL, ref_offload=True))
    host = f"{size(waiting.host)} of the CPU's memory per process"
    offers = advise(config, found, int(waiting.total / 0.9)).splitlines()
    assert f"  --ref_offload true: {size(waiting.total)}, and {host}" in offers
    offers = advise(config, waiting, 10**9).splitlines()
    assert any(offer.startswith("  --use_peft true --ref_offload false: ") for offer in offers)
    for without in ({"zero_stage": 3}, {"lora_r": 4}, {"beta": 0.0}, {"supervised": True}):
        for combination in _changes(replace(SMALL, **without)):
            flags = [flag for flag, _ in combination]
            assert "--ref_offload true" not in flags or "CONFIG=conf/ds_zero2_offload.json" in flags
            assert "zero_stage" in without or "--ref_offload true" not in flags


def settings_of(module, config, folder, *flags: str, held: list | None = None) -> Settings:
    """What `flags` are read as; `held` gets the arguments, with which an engine's settings live and die."""
    parser = module.make_parser()
    data, *_, args, model = parser.parse_args_and_config(["--use_cpu", "true", "--output_dir", str(folder), *flags])
    if held is not None:
        held.append(args)
    return read_settings(args, model, model.init_kwargs(args)["dtype"], data.freeze, config)


def test_flags_become_settings(config, tmp_path):
    usual = settings_of(train, config, tmp_path)
    assert usual == Settings(dtype=torch.float32)  # whose defaults are the paper's
    assert settings_of(train, config, tmp_path, "--dtype", "auto").dtype is (config.dtype or torch.float32)
    changed = settings_of(
        train, config, tmp_path, "--bf16", "true", "--use_peft", "true", "--lora_r", "4", "--load_in_4bit", "true",
        "--activation_checkpointing", "true", "--per_device_train_batch_size", "16", "--steps_per_generation", "2",
        "--optim", "adamw_8bit", "--beta", "0", "--freeze", "audio_encoder",
    )  # fmt: skip
    assert changed == Settings(
        dtype=torch.bfloat16, autocast=True, lora_r=4, four_bit=True, checkpointing=True, questions=2, beta=0.0,
        steps_per_generation=2, moments=0.5, freeze=("audio_encoder",),
    )  # fmt: skip
    supervised = settings_of(train_sft, config, tmp_path, "--per_device_train_batch_size", "2")
    assert supervised.supervised and supervised.questions == 2 and supervised.steps_per_generation == 1


@pytest.mark.parametrize("name", ["ds_zero2", "ds_zero3_offload"])
def test_an_engine_is_read_and_does_not_change_the_calculation(config, tmp_path, name):
    """Under ZeRO-3, transformers would divide each model that is built, these without storage too."""
    pytest.importorskip("deepspeed")
    from transformers.integrations import deepspeed

    offloaded, held = "offload" in name, []
    flags = ("--bf16", "true", "--deepspeed", str(ROOT / f"conf/{name}.json"))
    usual = estimate(config, replace(SMALL, zero_stage=3))
    try:
        settings = settings_of(train, config, tmp_path, *flags, held=held)
        assert (settings.dtype, settings.autocast) == (torch.bfloat16, False)
        assert (settings.offload_optimizer, settings.offload_weights) == (offloaded, offloaded)
        assert settings.zero_stage == (3 if offloaded else 2)
        assert deepspeed.is_deepspeed_zero3_enabled() == offloaded
        memory._measure_policy_pass.cache_clear()
        memory._measure_rollout.cache_clear()
        torch.manual_seed(0)
        assert estimate(config, replace(SMALL, zero_stage=3)) == usual
        assert deepspeed.is_deepspeed_zero3_enabled() == offloaded
        drawn = torch.rand(2)
        torch.manual_seed(0)
        assert torch.equal(torch.rand(2), drawn)
    finally:
        deepspeed.unset_hf_deepspeed_config()


@pytest.mark.slow
@pytest.mark.parametrize("module", [train, train_sft])
def test_a_run_that_cannot_fit_ends_before_its_model_is_loaded(
    small_model, questions, tmp_path, monkeypatch, capsys, module
):
    monkeypatch.setattr(startup, "device_of", lambda args: ("L4", 10_000_000))
    flags = f"--use_cpu true --model_name_or_path {small_model} --data_file {questions} --output_dir {tmp_path}"
    flags += " --questions_per_step 4"
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags.split(), "--disable_tqdm", "true"])

    def build(*args):
        raise AssertionError("the model would be loaded")

    with pytest.raises(SystemExit) as ended:
        startup.run_training(module.make_parser(), build)
    assert "this run does not fit devices of" in ended.value.code and "What would fit" in ended.value.code
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("memory of L4, 9.5 MiB per process; calculated: ")
    assert ("rollout" in line) == ("reference" in line) == (module is train)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--load_in_4bit true", "--load_in_4bit true stores the weights in too few bits to train them; add --use_peft"),
        ("--load_in_8bit true", "--load_in_8bit true"),
        ("--load_in_4bit true --use_peft true", "not installed; python -m pip install bitsandbytes=="),
        ("--load_in_4bit true --use_peft true --deepspeed conf/ds_zero3.json", "does not work with ZeRO-3"),
    ],
)
def test_what_cannot_be_trained_in_few_bits_is_refused(small_model, questions, tmp_path, monkeypatch, flags, message):
    from transformers.integrations import deepspeed

    if "deepspeed" in flags:
        pytest.importorskip("deepspeed")
    monkeypatch.setattr(packages, "find_spec", lambda name: "not installed" not in message)
    where = f"--use_cpu true --model_name_or_path {small_model} --data_file {questions} --output_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["train.py", *where.split(), *flags.split()])
    monkeypatch.chdir(ROOT)
    try:
        with pytest.raises(SystemExit) as ended:
            startup.run_training(train.make_parser(), lambda *args: pytest.fail("the model would be loaded"))
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert message in ended.value.code


def test_the_table_says_what_fits_one_device_and_eight(small_model, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "ROWS", fitting.ROWS[:2])
    monkeypatch.setattr("sys.argv", ["fitting.py", str(small_model), "--prompt", "120", "--seconds", "2"])
    fitting.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| settings | 1 device, CPU's | 8 devices, CPU's |"
    assert [row.split(" | ")[0] for row in rows] == ["| ds_zero2 (the paper)", "| ds_zero2, checkpointing"]
    assert all(row.count("fits 24 GB, 0 ") == 2 for row in rows), rows
