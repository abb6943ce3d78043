"""Nothing that comes with a model is executed: no code beside it, no pickle of its weights, no pickle of its state."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2AudioForConditionalGeneration

from dataset.dataset import load_train_dataset
from dataset.prompt import load_style
from dataset.questions import load_questions
from evaluation.checkpoints import check_whole, load_merged, load_model
from evaluation.identity import FINGERPRINTS, IncompleteCheckpoint, find_base, fingerprint
from model.qwen2_audio import load_processor
from run.checkpoints import RECORD, STATE, finish, forbid_pickles, read_settings
from run.curves import read_history
from test_grpo_trainer import make_trainer

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
    """transformers asks at the terminal whether to run it, and accepts a y."""
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
    for use in (
        load_processor,
        check_whole,
        load,
    ):
        try:
            use(folder)
        except ValueError as error:
            assert "trust_remote_code" not in str(error), "advice that this project refuses"
            assert not known, error
    assert not marker.exists()


def load(folder: Path):
    return load_model(folder, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("names", [["pytorch_model.bin"], [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]])
def test_pickled_weights_are_refused(folder, marker, names):
    (folder / "model.safetensors").unlink()
    for name in names:
        torch.save(Touch(marker), folder / name)
    for use in (check_whole, fingerprint, load):
        with pytest.raises(IncompleteCheckpoint, match="pytorch_model|weights"):
            use(folder)
    assert not marker.exists()


def test_a_pickled_adapter_is_refused(small_model, tmp_path, marker):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(Touch(marker), tmp_path / "adapter" / "adapter_model.bin")
    for use in (fingerprint, load_merged):
        with pytest.raises(IncompleteCheckpoint, match="adapter_model.bin"):
            use(tmp_path / "adapter")
    assert not marker.exists()


@pytest.fixture(scope="module")
def step(small_model, questions, tmp_path_factory) -> Path:
    """The output of a run of one step."""
    out = tmp_path_factory.mktemp("step") / "run"
    make_trainer(small_model, questions, out, max_steps=1, save_steps=1).train()
    return out


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_state_that_is_a_foreign_pickle_is_not_executed(step, small_model, questions, tmp_path, marker, name):
    shutil.copytree(step, tmp_path / "run")
    torch.save(Touch(marker), tmp_path / "run" / "checkpoint-1" / name)
    trainer = make_trainer(small_model, questions, tmp_path / "run", max_steps=2)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert not marker.exists()


def test_an_engines_state_is_not_executed(tmp_path, marker, monkeypatch):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    forbid_pickles()
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
    assert fingerprint(checkpoint) == fingerprint(folder), "a damaged record of hashes is written again"
    for read, name in ((load_style, "prompt_style.json"), (read_settings, RECORD), (read_state, STATE)):
        with pytest.raises(ValueError, match=name):
            read(checkpoint)
    assert read_history(tmp_path / "run") == []
    for name in ("config.json", "adapter_config.json"):
        (checkpoint / name).write_text(DEEP)
        with pytest.raises(IncompleteCheckpoint, match=name):
            check_whole(checkpoint)
        (checkpoint / name).write_text("{}")
    with pytest.raises(IncompleteCheckpoint, match="base_model_name_or_path"):
        find_base(checkpoint)
    (tmp_path / "rows.jsonl").write_text(questions.read_text() + DEEP + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 9"):
        load_train_dataset(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text("[" + DEEP)
    with pytest.raises(ValueError, match=r"rows\.json"):
        load_questions(tmp_path / "rows.json")


def read_state(checkpoint: Path):
    return finish(checkpoint, SimpleNamespace(output_dir=str(checkpoint.parent), max_steps=1))
