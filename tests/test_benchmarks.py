"""The benchmarks: what they count, held against sums made by hand and torch's counter, and that each of them runs. None
of their timings is looked at."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2AudioConfig

import floor
import row_by_row
import scaling
import step_time
import steps
from floor import ROW_BY_ROW, SHARED, SUPERVISED, Shape, count
from running import run, skip_without_compiler
from steps import Phases, Settings, Synchronisations
from without_storage import without_storage

TINY = [
    "--size",
    "tiny",
    "--device",
    "cpu",
    "--questions",
    "1",
    "--generations",
    "2",
    "--seconds",
    "1",
    "--repeats",
    "1",
]
TINY += ["--completion", "3"]


@pytest.fixture(scope="module")
def config() -> Qwen2AudioConfig:
    """So small that its operations can be summed up by hand."""
    audio = dict(num_mel_bins=4, d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16)
    text = dict(
        model_type="qwen2", hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50,
    )  # fmt: skip
    return Qwen2AudioConfig(audio_config=audio | {"max_source_positions": 10}, text_config=text)


def test_operations_are_those_summed_up_by_hand(config):
    """One question of 10 frames (5 positions, 2 audio tokens) and 3 tokens of text, 2 completions of 3 tokens."""
    shape = Shape(questions=1, generations=2, frames=10, prompt=5, completion=3)
    first, second = 2 * 10 * 4 * 3 * 8, 2 * 5 * 8 * 3 * 8  # the convolutions
    clip = first + second + 5 * 2 * (4 * 8 * 8 + 2 * 8 * 16) + 4 * 5 * 5 * 8 + 2 * 2 * 8 * 16
    token = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32)  # queries, keys and values, output, the three of the MLP
    prompt = 4 * token + 4 * 16 * (1 + 2 + 3 + 4)
    branch = 3 * token + 4 * 16 * (5 + 6 + 7)  # each sees the prompt but its last token, and itself
    head = 3 * 2 * 16 * 50
    found = {phase: work.operations for phase, work in count(config, shape, SHARED, 1000, 4).items()}
    forward = clip + prompt + 2 * (branch + head)
    assert found == {
        "encoder": clip, "prefill": prompt, "decoding": 2 * (branch + head), "reference": forward,
        "policy forward": forward, "backward": 2 * forward - first, "optimizer": 0,
    }  # fmt: skip
    supervised = count(config, shape, SUPERVISED, 1000, 4)
    assert supervised["policy forward"].operations == clip + prompt + branch + head
    assert supervised["optimizer"].bytes == 7 * 4 * 1000
    window = floor.encode(config, 20).operations
    rows = count(config, shape, ROW_BY_ROW, 1000, 4)
    assert rows["reference"].operations == 2 * (window + prompt + branch + head)
    # Three steps read the weights of layers and head, the cache of the prompt once for both completions, and theirs.
    weights, key_and_value = token // 2 + 16 * 50, 2 * 8
    cached = sum(4 + 2 * (t + 1) for t in range(3)) * key_and_value
    assert count(config, shape, SHARED, 1000, 4)["decoding"].bytes == 4 * (3 * weights + cached)


@pytest.mark.parametrize("lora", [False, True])
def test_operations_are_those_that_torch_counts(lora):
    """Of a pass row by row without padding. The adapters' own products are left out of ours."""
    settings = Settings("tiny", lora=lora, seconds=30)
    processor = steps.build_processor_of_30_seconds()
    model = steps.build(settings, processor)
    base = steps.base_model(model)
    base.set_attn_implementation("eager")  # whose products are all counted
    audio = torch.full((1, 750), base.config.audio_token_id)
    prompts = {"input_ids": torch.cat([audio, torch.arange(300, 310)[None]], dim=1)}
    prompts["attention_mask"] = torch.ones_like(prompts["input_ids"])
    prompts |= {"input_features": torch.randn(1, 128, 3000), "feature_attention_mask": torch.ones(1, 3000).long()}
    ids = torch.full((1, 1, 4), 300)
    with FlopCounterMode(display=False) as forward:
        loss = row_by_row.log_probs(model, prompts, ids, torch.ones_like(ids)).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    rows, length = 1, 764
    text = floor.read(base.config, rows * length, rows * length**2) + floor.score(base.config, rows * length)
    work = floor.encode(base.config, 3000) * rows + text
    if lora:
        assert work.operations == pytest.approx(forward.get_total_flops(), rel=0.2)
        expected = floor.backward(base.config, work, 3000, rows, lora=True)
        assert expected.operations < backward.get_total_flops() < 1.5 * expected.operations
    else:
        assert work.operations == forward.get_total_flops()
        assert floor.backward(base.config, work, 3000, rows, lora=False).operations == backward.get_total_flops()


def test_the_full_size_is_that_of_the_published_configuration(shared):
    """What costs something; the number of parameters follows from it."""
    source = Qwen2AudioConfig.from_pretrained(shared / "models" / "qwen2-audio-7b-no-weights")
    with torch.device("meta"):
        ours = steps.build_model(steps.build_processor_of_30_seconds(), **steps.SIZES["7b"]).config
    for part in ("audio_config", "text_config"):
        published, made = getattr(source, part), getattr(ours, part)
        for key in (
            "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins",
            "max_source_positions", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size", "tie_word_embeddings",
        ):  # fmt: skip
            assert getattr(made, key, None) == getattr(published, key, None), key


def test_a_device_is_waited_for_where_a_value_or_a_shape_is_asked_for():
    values = torch.arange(6.0)
    with Synchronisations(torch.device("cpu")) as waits:
        values * 2 + values[1:3].sum()
        assert waits.count == 0
        float(values.sum())
        assert waits.count == 1
        values[values > 2]
        values.nonzero()
        values.masked_select(values > 2)
    assert waits.count == 4


def test_a_device_is_waited_for_where_tensors_are_copied():
    device = torch.device("lazy:0")
    with without_storage():
        values, there = torch.arange(6), torch.zeros(6, device=device)
        with Synchronisations(device) as waits:
            values.to(device, non_blocking=True)
            there.copy_(values, non_blocking=True)
            there[there.long()]
            assert waits.count == 0
            there.cpu()
            values.to(device)
            there.copy_(values)
            there[values]
    assert waits.count == 4


def test_phases_hold_their_own_time_alone(monkeypatch):
    clock = iter([0, 1, 3, 7])
    monkeypatch.setattr(steps, "now", lambda device: next(clock))
    phases = Phases(torch.device("cpu"))
    with phases("outer"), phases("inner"):
        assert phases.current == "inner"
    assert phases.seconds == {"outer": 1 + 4, "inner": 2}


def test_a_step_is_timed_and_counted(tmp_path, monkeypatch, capsys):
    """All three ways, on a real model and real clips; the printed operations are the hand's."""
    monkeypatch.setattr(floor, "fastest", lambda run, device: 1e-3)
    monkeypatch.setattr(sys, "argv", ["step_time.py", *TINY, "--json", str(tmp_path / "step.json")])
    step_time.main()
    record, printed = json.loads((tmp_path / "step.json").read_text()), capsys.readouterr().out
    assert list(record["ways"]) == [ROW_BY_ROW, SHARED, SUPERVISED] and record["settings"]["prompt"] == 25 + 60
    for name, way in record["ways"].items():
        rollout = name != SUPERVISED
        for phase in ("encoder", "prefill", "decoding", "rewards", "reference"):
            assert (way["seconds"][phase] > 0) == rollout, (name, phase)
        for phase in ("data", "policy forward", "backward", "optimizer"):
            assert way["seconds"][phase] > 0, (name, phase)
        assert way["step"] == pytest.approx(sum(way["seconds"].values()))
        assert way["host_waits"] > 0 and way["peak_bytes"] > 4 * record["parameters"]
    # 100 frames, 50 positions, 25 audio tokens, 2 layers of 64; a window has 3000, 1500 and 750.
    clip = 2 * 3 * 64 * (100 * 128 + 50 * 64) + 2 * 50 * 2 * (4 + 8) * 64**2 + 2 * 4 * 50**2 * 64 + 2 * 25 * 64 * 128
    window = (
        2 * 3 * 64 * (3000 * 128 + 1500 * 64) + 2 * 1500 * 2 * 12 * 64**2 + 2 * 4 * 1500**2 * 64 + 2 * 750 * 64 * 128
    )
    assert record["ways"][SHARED]["operations"]["encoder"] == clip
    assert record["ways"][ROW_BY_ROW]["operations"]["encoder"] == 2 * window
    assert step_time.prefixed(clip) == "17.7 M" and step_time.prefixed(2 * window) == "3.29 G"
    encoders = [line.split() for line in printed.splitlines() if line.startswith("  encoder")]
    assert [" ".join(cells[2:4]) for cells in encoders] == ["3.29 G", "17.7 M"]
    assert "times as fast as row by row" in printed and "the host waits" in printed


def test_the_growth_of_a_step_is_measured_once_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(floor, "fastest", lambda run, device: 1e-3)
    monkeypatch.setattr(scaling, "AXES", {"generations": (2,), "completion": (3,)})
    command = [*TINY, "--records", str(tmp_path), "--picture", str(tmp_path / "scaling.png")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *command])
    scaling.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1x2-1s-3.json", "scaling.png"]
    monkeypatch.setattr(scaling, "measure", None)  # nothing is measured twice
    scaling.main()
    monkeypatch.setattr(sys, "argv", ["scaling.py", *command, "--text", "61"])
    with pytest.raises(TypeError):
        scaling.main()


@pytest.mark.slow
def test_all_that_a_gpu_is_asked_for_runs_and_a_part_that_is_there_is_skipped(tmp_path):
    skip_without_compiler("ds_zero2")
    asked = {
        "SIZE": "tiny",
        "CHECKS": "tiny",
        "REPEATS": "1",
        "QUESTIONS": "4",
        "OUT_DIR": tmp_path,
        "PYTHON": sys.executable,
    }
    options = ["--device", "cpu", "--questions", "1", "--generations", "2", "--seconds", "1", "--completion", "3"]
    options += ["--dtype", "bfloat16", "--processes", "8"]  # as on a GPU
    done = run("sh", "benchmarks/gpu.sh", *options, **asked)
    assert "FAILED" not in done.stdout
    table = (tmp_path / "table.md").read_text()
    assert table.count("not run on a GPU") == 4 and "ds_zero3" in table and "| a step, s |" in table
    again = run("sh", "benchmarks/gpu.sh", *options, **asked)
    assert again.stdout.count(".json is there") == 4 and "==" not in again.stdout
