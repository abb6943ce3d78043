"""Nothing that comes with a model is executed: no code beside it, no pickle of its weights, no pickle of its state."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration

import startup
import train
from dataset import check
from dataset.dataset import load_train_dataset
from dataset.prompt import load_style
from dataset.questions import load_questions
from model.checkpoints import (
    FINGERPRINTS,
    IncompleteCheckpoint,
    check_whole,
    find_base,
    fingerprint,
    load_merged,
    load_model,
)
from model.qwen2_audio import load_processor
from test_resume import make_trainer
from trainer.curves import read_history
from trainer.resume import RECORD, STATE, check_resumable, execute_nothing, finish

CODE = "import pathlib\npathlib.Path({marker!r}).touch()\n"


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def folder(small_model, tmp_path) -> Path:
    return shutil.copytree(small_model, tmp_path / "model")


@pytest.mark.parametrize("known", [True, False], ids=["a type that is known", "one that is not"])
@pytest.mark.parametrize("answer", ["n", "y"])
def test_code_beside_a_model_is_not_executed(folder, marker, monkeypatch, known, answer):
    """transformers asks at the terminal whether to run it, and takes a y."""
    monkeypatch.setattr("builtins.input", lambda *prompt: answer)
    for name in ("modeling_x.py", "configuration_x.py", "processing_x.py", "tokenization_x.py", "generate.py"):
        (folder / name).write_text(CODE.format(marker=str(marker)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    for file, entries in {
        "config.json": {
            "AutoConfig": "configuration_x.XConfig",
            "AutoModelForCausalLM": "modeling_x.X",
        },
        "processor_config.json": {"AutoProcessor": "processing_x.XProcessor"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_x.X", None]},
    }.items():
        content = json.loads((folder / file).read_text()) | {"auto_map": entries}
        if not known:
            content |= (
                {"model_type": "x"} if file == "config.json" else {"processor_class": "X", "tokenizer_class": "X"}
            )
        (folder / file).write_text(json.dumps(content))
    for load in (
        load_processor,
        check.load_processor,
        check_whole,
        lambda path: load_model(path, torch.float32, torch.device("cpu")),
    ):
        try:
            load(folder)
        except ValueError as error:
            assert "trust_remote_code" not in str(error), "advice that is refused"
            assert not known, error
    assert not marker.exists()


def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder):
    """In several files; the next test but one has one."""
    folder = folder.rename(folder.with_name("it's a 'model' [1]"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = dict(list(weights.items())[:9]), dict(list(weights.items())[9:])
    for i, part in enumerate(parts):
        torch.save(part, folder / f"pytorch_model-0000{i}-of-00002.bin")
    for use in (check_whole, fingerprint, lambda path: load_model(path, torch.float32, torch.device("cpu"))):
        with pytest.raises((IncompleteCheckpoint, OSError)) as refused:
            use(folder)
    with pytest.raises(IncompleteCheckpoint, match="its weights are a pickle") as refused:
        check_whole(folder)
    run(refused)
    check_whole(folder)
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == weights.keys() and all(torch.equal(converted[k], weights[k]) for k in weights)


def run(refused) -> subprocess.CompletedProcess:
    """The command of the message, on this interpreter."""
    program, *rest = shlex.split(re.search(r"convert it: (.*)", str(refused.value), re.DOTALL)[1])
    assert program == "python"
    return subprocess.run([sys.executable, *rest], capture_output=True, text=True, timeout=100)


def test_the_command_does_not_execute_a_pickle(folder, marker):
    (folder / "model.safetensors").unlink()
    torch.save(Touch(marker), folder / "pytorch_model.bin")
    with pytest.raises(IncompleteCheckpoint) as refused:
        check_whole(folder)
    assert "weights_only" in run(refused).stderr and not marker.exists()
    assert not (folder / "model.safetensors").exists()


def test_a_pickled_adapter_is_refused_too(small_model, folder, tmp_path, marker):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    for use in (fingerprint, load_merged):
        with pytest.raises(IncompleteCheckpoint, match=r"its weights are a pickle \(adapter_model") as refused:
            use(adapter)
    run(refused)
    assert load_merged(adapter)


def test_a_model_of_pickled_weights_does_not_start_a_run(folder, questions, tmp_path, monkeypatch):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    words = [
        "--use_cpu",
        "true",
        "--model_name_or_path",
        folder,
        "--data_file",
        questions,
        "--output_dir",
        tmp_path / "o",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    with pytest.raises(SystemExit, match="its weights are a pickle"):
        startup.run_training(train.make_parser(), None)


@pytest.fixture(scope="module")
def step(small_model, questions, tmp_path_factory) -> Path:
    """The output of a run of one step."""
    out = tmp_path_factory.mktemp("step") / "run"
    make_trainer(small_model, questions, out, max_steps=1).train()
    return out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rollouts_0.pt"])
def test_state_that_is_a_foreign_pickle_is_not_executed(step, small_model, questions, tmp_path, marker, name):
    shutil.copytree(step, tmp_path / "run")
    torch.save(Touch(marker), tmp_path / "run" / "checkpoint-1" / name)
    trainer = make_trainer(small_model, questions, tmp_path / "run", max_steps=2)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert not marker.exists()


def test_so_it_is_for_an_engines_state_which_the_engine_itself_reads_as_any_pickle(tmp_path, marker, monkeypatch):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    execute_nothing(engine=True)
    state = {
        "stage": ZeroStageEnum.weights, "scaler": LossScaler(2.0), "dynamic": DynamicLossScaler(4.0, 2.0, 1000, 1, 1, True),
        "part": fragment_address(numel=1, start=2), "tensor": torch.ones(2),
    }  # fmt: skip
    torch.save(state, tmp_path / "optim_states.pt")
    read = torch.load(tmp_path / "optim_states.pt", weights_only=False)  # as DeepSpeed does
    assert read["stage"] == state["stage"] and read["part"] == state["part"] and read["scaler"].cur_scale == 2
    torch.save(state | {"x": Touch(marker)}, tmp_path / "optim_states.pt")
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        torch.load(tmp_path / "optim_states.pt", weights_only=False)
    assert not marker.exists()


DEEP = '{"a":' * 100_000


def test_json_that_is_nested_too_deep_breaks_no_reader(folder, questions, tmp_path):
    shutil.copytree(folder, checkpoint := tmp_path / "run" / "checkpoint-1")
    for name in (RECORD, STATE, FINGERPRINTS, "prompt_style.json"):
        (checkpoint / name).write_text(DEEP)
    with pytest.raises(ValueError, match="prompt_style.json.*not JSON"):
        load_style(checkpoint)
    assert fingerprint(checkpoint) == fingerprint(folder), "a damaged record of hashes is written anew"
    with pytest.raises(ValueError, match=f"{RECORD} is damaged"):
        check_resumable(checkpoint)
    with pytest.raises(ValueError, match="not JSON"):
        finish(checkpoint, None)
    with pytest.raises(FileNotFoundError, match="no trainer_state.json"):
        read_history(tmp_path / "run")
    for name, said in (
        ("config.json", "config.json is missing or cut off"),
        ("adapter_config.json", "adapter_config.json"),
    ):
        (checkpoint / name).write_text(DEEP)
        with pytest.raises(IncompleteCheckpoint, match=said):
            check_whole(checkpoint)
        (checkpoint / name).write_text("{}")
    with pytest.raises(IncompleteCheckpoint, match="names no base model"):
        find_base(checkpoint)
    (tmp_path / "rows.jsonl").write_text(questions.read_text() + DEEP + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 9: not JSON"):
        load_train_dataset(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text("[" + DEEP)
    with pytest.raises(ValueError, match=r"rows\.json: not JSON"):
        load_questions(tmp_path / "rows.json")
