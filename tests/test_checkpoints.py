"""A checkpoint's fingerprint: every byte that decides its answers counts, and is hashed once; an adapter's base model and
full model. Loading and saving are tested with the trainers (`test_saving.py`, `test_lora.py`) and the evaluation."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from evaluation import checkpoints, identity
from evaluation.checkpoints import check_model, check_whole, full_model, load_merged
from evaluation.identity import FINGERPRINTS, IncompleteCheckpoint, find_base, fingerprint
from model.checkpoints import complete_checkpoint
from model.qwen2_audio import load_processor

SIZE = 3_000_000  # bytes of a file of weights


def make_checkpoint(folder: Path, weights: str = "model.safetensors", config: str = "config.json", **settings) -> Path:
    """A folder with the files that count: none of them is read as what its name says."""
    folder.mkdir()
    (folder / weights).write_bytes(np.random.default_rng(0).bytes(SIZE))
    (folder / config).write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def flip(path: Path, position: int) -> None:
    """Change one bit in place, and leave size and mtime as they were."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint-100", dtype="float32")


@pytest.mark.parametrize("position", [0, 5_000, 1_000_003, 2_222_222, SIZE - 1])
def test_every_byte_counts_even_under_the_old_time(checkpoint, position):
    before = fingerprint(checkpoint)
    assert len(before) == 16 and int(before, 16)
    flip(checkpoint / "model.safetensors", position)
    changed = fingerprint(checkpoint)
    assert changed != before
    flip(checkpoint / "model.safetensors", position)
    assert fingerprint(checkpoint) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.json"])
def test_configuration_and_processor_count(checkpoint, name):
    before = fingerprint(checkpoint)
    (checkpoint / name).write_text('{"other": 1}')
    assert fingerprint(checkpoint) != before


def test_what_decides_no_answer_does_not_count(checkpoint):
    before = fingerprint(checkpoint)
    for name in ("generation_config.json", "trainer_state.json", "README.md"):
        (checkpoint / name).write_text("{}")
    assert fingerprint(checkpoint) == before


def test_every_shard_counts(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    shards = [f"model-{number}.safetensors" for number in (1, 2, 3)]
    for shard in shards:
        (checkpoint / shard).write_bytes(b"0" * SIZE)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
    found = {fingerprint(checkpoint)}
    for shard in shards:
        flip(checkpoint / shard, SIZE // 2)
        found.add(fingerprint(checkpoint))
    assert len(found) == 4


def test_times_and_places_do_not_count(checkpoint, tmp_path):
    before = fingerprint(checkpoint)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    os.utime(weights, (1, 1))
    assert fingerprint(checkpoint) == before
    assert fingerprint(shutil.copytree(checkpoint, tmp_path / "copy")) == before
    assert fingerprint(shutil.copytree(checkpoint, tmp_path / "plain", copy_function=shutil.copyfile)) == before


def test_a_file_is_hashed_once(checkpoint):
    before = fingerprint(checkpoint)
    record = checkpoint / FINGERPRINTS
    remembered = json.loads(record.read_text())
    record.write_text(json.dumps({key: "0" * 64 for key in remembered}))
    assert fingerprint(checkpoint) != before, "what is remembered is used"
    for path in checkpoint.iterdir():
        os.utime(path, (1, 1))
    assert fingerprint(checkpoint) == before, "but not for a file of another time"
    assert len(json.loads(record.read_text())) == len(remembered), "and is forgotten with it"


@pytest.mark.parametrize("damaged", ["", '{"model', "5", "[1]", "\udcff"])
def test_a_damaged_record_is_written_anew(checkpoint, damaged):
    before = fingerprint(checkpoint)
    whole = (checkpoint / FINGERPRINTS).read_bytes()
    (checkpoint / FINGERPRINTS).write_bytes(damaged.encode(errors="surrogateescape"))
    assert fingerprint(checkpoint) == before
    assert (checkpoint / FINGERPRINTS).read_bytes() == whole


@pytest.mark.parametrize("obstacle", ["read-only folder", "a folder of the record's name"])
def test_where_nothing_can_be_written_it_is_computed_again(checkpoint, tmp_path, obstacle):
    before = fingerprint(shutil.copytree(checkpoint, tmp_path / "copy"))
    if obstacle == "read-only folder":  # in which root writes all the same
        checkpoint.chmod(0o555)
    else:
        (checkpoint / FINGERPRINTS).mkdir()
    try:
        assert fingerprint(checkpoint) == before == fingerprint(checkpoint)
        assert not list(checkpoint.glob("*.tmp"))
    finally:
        checkpoint.chmod(0o755)


def test_an_adapter_is_told_apart_by_its_base_model_too(checkpoint, tmp_path):
    adapter = tmp_path / "adapter"
    make_checkpoint(
        adapter, "adapter_model.safetensors", "adapter_config.json", base_model_name_or_path=str(checkpoint), r=4
    )
    found = [fingerprint(adapter)]
    flip(checkpoint / "model.safetensors", SIZE // 2)
    found.append(fingerprint(adapter))
    flip(adapter / "adapter_model.safetensors", SIZE // 2)
    found.append(fingerprint(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 64}))
    found.append(fingerprint(adapter))
    assert len(set(found)) == 4
    moved = checkpoint.rename(tmp_path / "moved")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(moved)}))
    fingerprint(adapter)


@pytest.mark.parametrize("lacks", ["folder", "weights", "shard"])
def test_an_adapter_without_its_base_model_has_no_fingerprint(checkpoint, tmp_path, lacks):
    adapter = tmp_path / "adapter"
    make_checkpoint(
        adapter, "adapter_model.safetensors", "adapter_config.json", base_model_name_or_path=str(checkpoint)
    )
    if lacks == "folder":
        shutil.rmtree(checkpoint)
    else:
        (checkpoint / "model.safetensors").unlink()
    if lacks == "shard":
        index = {"weight_map": {"a": "model-1.safetensors"}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((IncompleteCheckpoint, FileNotFoundError), match=str(checkpoint)):
        fingerprint(adapter)


def test_a_base_model_is_found_where_it_is_recorded_or_beside_the_adapter(checkpoint, tmp_path, monkeypatch):
    adapter = tmp_path / "run" / "adapter"
    adapter.parent.mkdir()
    settings = {"base_model_name_or_path": str(checkpoint)}
    make_checkpoint(adapter, "adapter_model.safetensors", "adapter_config.json", **settings)
    assert find_base(adapter) == checkpoint
    moved = checkpoint.rename(adapter.parent / checkpoint.name)
    assert find_base(adapter) == moved
    monkeypatch.chdir(adapter.parent)
    assert find_base("adapter") == moved
    moved.rename(tmp_path / checkpoint.name.upper())
    with pytest.raises(IncompleteCheckpoint, match="merge_lora.py"):
        find_base(adapter)


def test_pickled_weights_are_refused(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "checkpoint")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for use in (check_whole, fingerprint):
        with pytest.raises(IncompleteCheckpoint, match="pytorch_model.bin.*safetensors"):
            use(folder)


def test_nothing_is_written_into_the_hubs_cache(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setattr(identity.constants, "HF_HUB_CACHE", str(tmp_path / "link"))
    before = sorted(checkpoint.iterdir())
    found = fingerprint(checkpoint)
    assert sorted(checkpoint.iterdir()) == before
    monkeypatch.undo()
    assert fingerprint(checkpoint) == found and (checkpoint / FINGERPRINTS).is_file()


@pytest.fixture(scope="module")
def adapter(small_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "checkpoint-1"
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    complete_checkpoint(folder, load_processor(small_model))
    return folder


def test_a_full_model_is_written_once(adapter, tmp_path):
    folder = full_model(adapter, tmp_path / "start")
    written = (folder / "config.json").stat().st_mtime_ns
    merged = load_merged(adapter).state_dict()
    found = Qwen2AudioForConditionalGeneration.from_pretrained(folder).state_dict()
    assert merged.keys() == found.keys() and all(torch.equal(merged[name], found[name]) for name in merged)
    assert full_model(adapter, folder) == folder and (folder / "config.json").stat().st_mtime_ns == written
    (folder / "merged_from.json").write_text("of another adapter")
    full_model(adapter, folder)
    assert (folder / "config.json").stat().st_mtime_ns > written
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_two_machines_that_merge_at_the_same_time_get_one_full_model(adapter, tmp_path, monkeypatch):
    """The other one writes the folder while this one merges."""
    write, folder = checkpoints.write_merged, tmp_path / "start"

    def other_first(*arguments) -> None:
        monkeypatch.setattr(checkpoints, "write_merged", write)
        full_model(adapter, folder)
        (folder / "config.json").touch()
        os.utime(folder / "config.json", (1, 1))
        write(*arguments)

    monkeypatch.setattr(checkpoints, "write_merged", other_first)
    assert full_model(adapter, folder) == folder
    assert (folder / "config.json").stat().st_mtime == 1, "what is in use was replaced"
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_a_base_model_that_lacks_a_tensor_is_not_merged(adapter, small_model, tmp_path):
    base = shutil.copytree(small_model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteCheckpoint):
        load_merged(adapter, str(base))


def test_a_checkpoint_with_the_record_is_whole_and_loads(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "checkpoint")
    before = {path.name for path in folder.iterdir()}
    fingerprint(folder)
    assert {path.name for path in folder.iterdir()} == before | {FINGERPRINTS}
    check_whole(folder)
    AutoProcessor.from_pretrained(folder)


def damage(folder: Path, how: str) -> Path:
    """The folder, after one of its files was damaged."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = min(tensors)
    if how == "missing":
        del tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name][..., :1].contiguous()
    else:
        tensors[name].view(-1)[0] = float(how)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_check_leaves_the_precision_as_the_user_set_it(small_model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # --tf32 true
    check_model(small_model)
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("how", ["missing", "shape", "nan", "-inf"])
@pytest.mark.parametrize("part", ["model", "adapter", "its base"])
def test_weights_that_are_not_all_there_are_refused_in_one_line(adapter, small_model, tmp_path, part, how):
    whole = shutil.copytree(small_model if part == "model" else adapter, tmp_path / "whole")
    base = shutil.copytree(small_model, tmp_path / "base")
    if part != "model":
        config = json.loads((whole / "adapter_config.json").read_text())
        (whole / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    check_model(whole)
    damage(base if part == "its base" else whole, how)
    with pytest.raises(IncompleteCheckpoint) as error:
        check_model(whole)
    assert str(base if part == "its base" else whole) in str(error.value) and "\n" not in str(error.value)
