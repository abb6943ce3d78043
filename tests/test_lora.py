"""GRPO with adapters: the base model is the reference, checkpoints hold the adapter, and merge into a full model."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
from trl import GRPOConfig

import row_by_row
from dataset.dataset import load_train_dataset
from dataset.prompt import load_style
from evaluation.checkpoints import check_whole, full_model, load_merged, load_model, write_merged
from evaluation.identity import IncompleteCheckpoint, find_base, fingerprint
from merge_lora import main as merge_main
from model.checkpoints import complete_checkpoint
from model.qwen2_audio import load_processor
from run.arguments import AudioModelConfig
from running import run, skip_without_compiler
from runs import length_reward
from test_grpo_trainer import roll_out
from trainer.grpo_trainer import AudioGRPOTrainer

TARGETS = AudioModelConfig().lora_target_modules


@pytest.fixture
def trainer(small_model, questions, tmp_path):
    args = GRPOConfig(
        str(tmp_path / "out"), num_generations=4, per_device_train_batch_size=8, max_completion_length=8, beta=0.1,
        learning_rate=1e-2, bf16=False, use_cpu=True, report_to="none", max_steps=2, save_steps=2, save_only_model=True,
    )  # fmt: skip
    return AudioGRPOTrainer(
        str(small_model), [length_reward], args, load_train_dataset(questions),
        peft_config=LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )  # fmt: skip


def test_the_reference_is_the_base_model_with_the_adapter_off(trainer, small_model):
    assert trainer.ref_model is None, "a second copy of the model in memory"
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # starts at 0, where adapter on and off are the same
            parameter.data.normal_(0, 0.2, generator=generator)
    rollout = roll_out(trainer, 2)
    base = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    prompts, ids, mask = row_by_row.as_inputs(rollout.questions), rollout.ids, rollout.mask
    with torch.no_grad():
        expected = row_by_row.log_probs(base, prompts, ids, mask)
        adapted = row_by_row.log_probs(trainer.model, prompts, ids, mask)
    torch.testing.assert_close(rollout.ref_logps * mask, expected, atol=1e-4, rtol=1e-4)
    assert (adapted - expected).abs().max() > 0.05


def test_the_checkpoint_is_the_adapter_and_merges_into_what_was_trained(trainer, small_model, tmp_path):
    base_before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert "lora_" in name or torch.equal(parameter, base_before[name]), name
    folder = tmp_path / "out" / "checkpoint-2"
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert not (folder / "model.safetensors").exists() and load_style(folder) == "answer"

    write_merged(folder, tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
        load_file(small_model / "model.safetensors")
    )
    assert load_style(tmp_path / "merged") == "answer"
    AutoProcessor.from_pretrained(tmp_path / "merged")
    rollout = roll_out(trainer, 1)
    prompts, ids, mask = row_by_row.as_inputs(rollout.questions), rollout.ids, rollout.mask
    trainer.model.eval()
    merged = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = row_by_row.log_probs(trainer.model, prompts, ids, mask)
        torch.testing.assert_close(row_by_row.log_probs(merged, prompts, ids, mask), expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_merged(small_model, adapter, tmp_path, monkeypatch):
    for folder in (small_model, rename_base(adapter, tmp_path / "lost", str(tmp_path / "gone"))):
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", "--adapter", str(folder), "--out", str(tmp_path / "merged")])
        with pytest.raises(SystemExit, match=str(folder)):
            merge_main()
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", "--adapter", str(adapter), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=str(tmp_path)):
        merge_main()


@pytest.fixture(scope="module")
def adapter(small_model, tmp_path_factory) -> Path:
    """An adapter checkpoint that changes its base's answers, as a trainer completes it."""
    folder = tmp_path_factory.mktemp("adapter") / "checkpoint-1"
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    model.save_pretrained(folder)
    complete_checkpoint(folder, load_processor(small_model))
    return folder


def record_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def rename_base(adapter: Path, to: Path, name: str | None, **more) -> Path:
    """A copy of an adapter that names another base."""
    shutil.copytree(adapter, to)
    record = record_of(adapter) | {"base_model_name_or_path": name} | more
    (to / "adapter_config.json").write_text(json.dumps(record))
    return to


def start(script, name: str, *flags) -> None:
    """One step of a training script."""
    words = ["--use_cpu", "true", "--questions_per_step", "2", "--max_steps", "1", "--save_steps", "1"]
    words += ["--num_generations", "2", "--max_completion_length", "4"] if name == "train.py" else []
    status, said = script(name, *words, "--report_to", "none", *flags)
    assert status == 0, said


@pytest.mark.parametrize("name", ["train.py", pytest.param("train_sft.py", marks=pytest.mark.slow)])
def test_the_base_is_recorded_so_that_it_is_found_from_anywhere(
    small_model, questions, tmp_path, monkeypatch, script, name
):
    monkeypatch.chdir(small_model.parent)
    flags = ["--model_name_or_path", small_model.name, "--data_file", questions, "--output_dir", tmp_path / "out"]
    start(script, name, "--use_peft", "true", *flags)
    monkeypatch.chdir(tmp_path)
    for folder in (Path("out"), Path("out/checkpoint-1")):
        assert find_base(folder).samefile(small_model)
    assert load_merged(Path("out/checkpoint-1"))


def test_a_hub_name_is_recorded_with_its_revision(tmp_path):
    config = AudioModelConfig(model_name_or_path="a/b", model_revision="v1", use_peft=True)
    assert config.adapters().revision == "v1"
    assert AudioModelConfig(model_name_or_path="a/b", use_peft=True).adapters().revision is None
    assert (
        AudioModelConfig(model_name_or_path=str(tmp_path), model_revision="v1", use_peft=True).adapters().revision
        is None
    )
    assert AudioModelConfig().adapters() is None


def test_a_base_beside_the_adapter_is_found(adapter, small_model, tmp_path):
    moved = rename_base(adapter, tmp_path / "checkpoint-1", "/elsewhere/base")
    shutil.copytree(small_model, tmp_path / "base")
    assert find_base(moved).samefile(tmp_path / "base")


@pytest.mark.parametrize("name", ["/gone/base", "gone/base", "exp/gone/base", None])
@pytest.mark.parametrize(
    "use", [fingerprint, load_merged, lambda path: load_model(path, torch.float32, torch.device("cpu"))]
)
def test_a_missing_base_is_named_with_the_command_that_merges_another_copy(
    adapter, small_model, tmp_path, monkeypatch, name, use
):
    lost = rename_base(adapter, tmp_path / "it's lost", name)
    with pytest.raises(IncompleteCheckpoint) as error:
        use(lost)
    assert str(lost) in str(error.value) and (name or "base_model_name_or_path") in str(error.value)
    if name == "/gone/base" and use is fingerprint:
        command = shlex.split(str(error.value).partition("src/")[2])[:7]
        words = [{"FOLDER": str(small_model)}.get(word, word) for word in command]
        words[-1] = str(tmp_path / "full")
        monkeypatch.setattr(sys, "argv", words)
        merge_main()
        write_merged(adapter, tmp_path / "expected")
        assert fingerprint(tmp_path / "full") == fingerprint(tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["false", "true"])
def test_a_run_starts_from_an_adapter_as_from_its_merged_model(adapter, questions, tmp_path, script, peft):
    """With a learning rate of 0, what is saved is what was loaded."""
    out, merged = tmp_path / "out", load_merged(adapter).state_dict()
    flags = ["--model_name_or_path", adapter, "--data_file", questions, "--output_dir", out, "--learning_rate", "0"]
    start(script, "train.py", *flags, "--use_peft", peft)
    if peft == "true":
        assert record_of(out)["base_model_name_or_path"] == str(out / "start")
    else:
        check_whole(out)
    found = load_model(out, torch.float32, torch.device("cpu")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.items())
    written = (out / "start" / "config.json").stat().st_mtime_ns
    assert full_model(adapter, out / "start") == out / "start"
    assert (out / "start" / "config.json").stat().st_mtime_ns == written, "merged once"


@pytest.mark.slow
def test_adapters_with_zero3_on_two_processes(adapter, questions, tmp_path):
    """From an adapter's checkpoint, which one process merges."""
    skip_without_compiler("ds_zero3")
    run(
        "sh", "run_grpo.sh", "--use_cpu", "true", "--use_peft", "true", "--max_steps", "2", "--save_steps", "2",
        "--questions_per_step", "2", "--num_generations", "4", "--max_completion_length", "6", "--learning_rate", "1e-2",
        "--freeze", "audio_encoder",  # which runs where its weights are gathered, in the rollout
        MODEL_NP=adapter, DATA_FILE=questions, OUT_DIR=tmp_path, GPU_NUM=2, timeout=150,
        CONFIG="conf/ds_zero3.json",
    )  # fmt: skip
    tensors = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert tensors and all(tensor.numel() for tensor in tensors.values())
    assert load_merged(tmp_path / "checkpoint-2")
