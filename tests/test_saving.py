"""trainer/saving.py and model/checkpoints.py: tensor names, processor files and prompt style of every checkpoint, which
transformers 4 reads as well."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from conftest import ROOT
from dataset.dataset import load_train_dataset
from dataset.prompt import load_style
from evaluation.checkpoints import check_whole, write_merged
from evaluation.identity import IncompleteCheckpoint
from model.checkpoints import PROCESSOR_FILES, complete_checkpoint
from run.arguments import LINEAR_LAYERS
from running import run, skip_without_compiler
from runs import length_reward, make_run
from tiny import build_processor
from train import RecipeConfig
from trainer.grpo_trainer import AudioGRPOTrainer

OLDER = ("transformers==4.49.0", "tokenizers==0.21.4", "huggingface_hub==0.36.2")


@contextlib.contextmanager
def umask(mask: int):
    """Create files with this umask, in subprocesses too."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def processor_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).exists()}


def make_folder(folder: Path, model: Path) -> Path:
    """A folder with a model's config, as if its weights had been saved there."""
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    return folder


def checkpoints_in(folder: Path) -> list[Path]:
    return sorted({path.parent for path in folder.rglob("*model.safetensors")})


def assert_everybody_reads(out: Path, base: Path, count: int) -> None:
    """`out` holds `count` checkpoints, all with the processor's files of `base`, and modes of umask 027."""
    assert len(checkpoints_in(out)) == count
    for folder in checkpoints_in(out):
        assert processor_files(folder) == processor_files(base), folder
        check_whole(folder)
    modes = {path: oct(path.stat().st_mode & 0o666) for path in out.rglob("*") if path.is_file()}
    assert set(modes.values()) == {oct(0o640)}, modes


def train_one_step(kind: str, model: Path, data: Path, out: Path) -> Path:
    """Train a step in this process, with optimizer state in the checkpoint; returns the folder of a full model."""
    if kind != "lora":
        make_run(kind, model, data, out, max_steps=1).train()
        return out / "checkpoint-1"
    args = RecipeConfig(
        str(out), questions_per_step=2, num_generations=2, max_completion_length=4, max_steps=1, save_steps=1,
        learning_rate=1e-2, use_cpu=True, report_to="none",
    )  # fmt: skip
    adapters = LoraConfig(r=4, target_modules=list(LINEAR_LAYERS), task_type="CAUSAL_LM")
    AudioGRPOTrainer(str(model), [length_reward], args, load_train_dataset(data), peft_config=adapters).train()
    write_merged(out / "checkpoint-1", out / "merged")
    return out / "merged"


@pytest.fixture(scope="module", params=["grpo", "sft", "lora"])
def trained(request, tiny_model, questions, tmp_path_factory) -> Path:
    """A full model's folder, written with umask 027, in its run's output folder."""
    with umask(0o027):
        out = tmp_path_factory.mktemp(request.param) / "run"
        return train_one_step(request.param, tiny_model, questions, out)


def test_a_checkpoint_has_the_bases_processor_and_is_readable_for_the_group(shared, trained):
    base = shared / "models" / "qwen2-audio-7b-no-weights"
    assert len(processor_files(base)) == 8
    assert_everybody_reads(trained.parent, base, count=2 if trained.name == "merged" else 1)


def test_a_checkpoint_has_the_bases_tensor_names_and_the_prompt_style(tiny_model, trained):
    def names(folder: Path) -> set[str]:
        with safe_open(folder / "model.safetensors", "pt") as weights:
            return set(weights.keys())

    assert names(trained) == names(tiny_model)
    style = "choice" if trained.parent.parent.name.startswith("sft") else "answer"
    assert load_style(trained) == style


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "engine"), [("grpo", "ds_zero3"), ("sft", "ds_zero2"), ("lora", "ds_zero3")])
def test_a_checkpoint_has_them_under_deepspeed(shared, tiny_model, questions, tmp_path, engine, kind):
    skip_without_compiler(engine)
    flags = [] if kind == "sft" else ["--num_generations", "2", "--max_completion_length", "4"]
    out = tmp_path / "run"
    with umask(0o027):
        run(
            "sh", "run_sft.sh" if kind == "sft" else "run_grpo.sh", "--use_cpu", "true", "--max_steps", "1", "--save_steps", "1",
            "--questions_per_step", "2", "--use_peft", kind == "lora", *flags,
            MODEL_NP=tiny_model, DATA_FILE=questions, OUT_DIR=out, GPU_NUM=2,
            CONFIG=f"conf/{engine}.json",
        )  # fmt: skip
        if kind == "lora":
            write_merged(out / "checkpoint-1", out / "merged")
    assert list(out.rglob("*optim_states.pt"))
    base = shared / "models" / "qwen2-audio-7b-no-weights"
    assert_everybody_reads(out, base, count=3 if kind == "lora" else 2)  # the result included


def test_files_of_an_earlier_processor_are_replaced(small_model, tmp_path):
    processor = AutoProcessor.from_pretrained(small_model)
    for name in ("first", "second"):
        folder = make_folder(tmp_path / name, small_model)
        (folder / "merges.txt").write_text("another tokenizer's\n")
        complete_checkpoint(folder, processor)
        complete_checkpoint(folder, AutoProcessor.from_pretrained(folder))  # a run in its model's folder
        assert processor_files(folder) == processor_files(small_model)
        processor = AutoProcessor.from_pretrained(folder)


def test_the_hubs_files_are_copied_from_its_cache(shared, small_model, tmp_path, monkeypatch):
    source = shared / "models" / "qwen2-audio-7b-no-weights"
    repository = tmp_path / "models--who--audio"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for path in source.iterdir():  # the layout of the hub's client
        shutil.copyfile(path, repository / "blobs" / f"hash of {path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash of {path.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    out = make_folder(tmp_path / "out", small_model)
    complete_checkpoint(out, AutoProcessor.from_pretrained("who/audio"))
    assert processor_files(out) == processor_files(source)
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_processor_without_files_is_saved(small_model, tmp_path):
    made = build_processor(["What is it?"])
    lost = AutoProcessor.from_pretrained(shutil.copytree(small_model, tmp_path / "moved"))
    shutil.rmtree(tmp_path / "moved")
    for name, processor in (("made", made), ("lost", lost)):
        complete_checkpoint(make_folder(tmp_path / name, small_model), processor)
        found = AutoProcessor.from_pretrained(tmp_path / name)
        assert found.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert found.chat_template == processor.chat_template


def test_the_config_has_the_names_of_transformers_4_and_5(small_model, tmp_path):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model, dtype="bfloat16")
    model.config.text_config.rope_parameters["rope_theta"] = 12345.0
    model.save_pretrained(tmp_path)
    complete_checkpoint(tmp_path, AutoProcessor.from_pretrained(small_model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"] == 12345.0
    assert Qwen2AudioConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()


def test_weights_that_are_cut_off_or_missing_are_named(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "checkpoint")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    check_whole(folder)
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(IncompleteCheckpoint, match="model.safetensors"):
            check_whole(folder)
    weights.unlink()
    with pytest.raises(IncompleteCheckpoint):
        check_whole(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(IncompleteCheckpoint, match="model-1.safetensors"):
        check_whole(folder)


@pytest.fixture(scope="session")
def older_transformers() -> Path:
    """A folder with transformers 4.49 and what it needs in other versions than ours; made once per environment."""
    folder = Path(sys.executable).parents[1] / OLDER[0].replace("==", "-")
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(unfinished), *OLDER]
        done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        if done.returncode:
            shutil.rmtree(unfinished, ignore_errors=True)
            pytest.skip(f"{OLDER[0]} cannot be installed here: {done.stdout[-500:]}")
        unfinished.rename(folder)
    return folder


@pytest.mark.slow
def test_transformers_4_reads_it_as_ours_does(trained, older_transformers, questions, tmp_path):
    read = ("python", ROOT / "tests" / "read_checkpoint.py", trained, questions.parent / "3.wav")
    run(*read, tmp_path / "ours.npz")
    run(*read, tmp_path / "older.npz", PYTHONPATH=older_transformers)
    ours, older = np.load(tmp_path / "ours.npz"), np.load(tmp_path / "older.npz")
    assert str(older["version"]) == "4.49.0" and str(ours["version"]).startswith("5.")
    assert str(ours["dtype"]) == str(older["dtype"])
    for key in ("input_ids", "attention_mask", "feature_attention_mask", "answer"):
        np.testing.assert_array_equal(ours[key], older[key], err_msg=key)
    np.testing.assert_allclose(ours["input_features"], older["input_features"], atol=1e-6)
    np.testing.assert_allclose(ours["logits"], older["logits"], atol=1e-5)
