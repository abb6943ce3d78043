"""A checkpoint's fingerprint: every byte that decides its answers counts, and is hashed once. Loading and saving are
tested with the trainers (`test_saving.py`, `test_lora.py`) and the evaluation."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoProcessor

from model.checkpoints import FINGERPRINTS, IncompleteCheckpoint, check_whole, fingerprint

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
def test_an_adapter_without_its_base_model_names_both(checkpoint, tmp_path, lacks):
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
    with pytest.raises(IncompleteCheckpoint) as error:
        fingerprint(adapter)
    assert str(adapter) in str(error.value) and str(checkpoint) in str(error.value)


def test_a_checkpoint_with_the_record_is_whole_and_loads(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "checkpoint")
    before = {path.name for path in folder.iterdir()}
    fingerprint(folder)
    assert {path.name for path in folder.iterdir()} == before | {FINGERPRINTS}
    check_whole(folder)
    AutoProcessor.from_pretrained(folder)
