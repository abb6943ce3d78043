"""Fixtures of several test files: reference material, small real models, questions with clips."""

import gc
import hashlib
import json
import os
import runpy
import shutil
from pathlib import Path

# Before torch and transformers are imported: no network, and no thread pool larger than the work.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: others need the cores too
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # reference material that may lie beside a checkout; third parties' data, not ours


def pytest_collection_finish() -> None:
    """Exclude all imported modules from garbage collections: each would take half a second, and every run ends with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (recorded reference models and real clips), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(shared, tmp_path_factory) -> Path:
    """A folder with a Qwen2-Audio of random weights, shrunk in width and depth, and the real processor's files."""
    import torch
    from transformers import GenerationConfig, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    source = shared / "models" / "qwen2-audio-7b-no-weights"
    config = Qwen2AudioConfig.from_pretrained(source)
    for key, value in dict(encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, d_model=32).items():
        setattr(config.audio_config, key, value)
    for key, value in dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ).items():
        setattr(config.text_config, key, value)
    config.text_config.layer_types = config.text_config.layer_types[:2]
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(source)
    folder = tmp_path_factory.mktemp("models") / "tiny"  # a name that says nothing of Qwen2-Audio, on purpose
    model.save_pretrained(folder)
    for path in source.iterdir():
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    return folder


QUESTION = {"question_text": "What is in the video?", "multi_choice": ["dog", "cat", "bell"], "dataset_name": "AVQA"}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A folder with a Qwen2-Audio of random weights and a small vocabulary of its own: needs no reference material."""
    from tiny import build_demo_model, build_processor

    folder = tmp_path_factory.mktemp("models") / "small"
    text = "What is in the audio? ['dog', 'cat', 'bell'] <answer>dog</answer> <think> </think>"
    build_demo_model(
        folder, build_processor([text]), seed=0, initializer_range=0.2, hidden_size=32, audio_size=32, layers=2
    )
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A training file of eight questions, each with a clip of its own between 0.5 and 2 s."""
    folder = tmp_path_factory.mktemp("questions")
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for i in range(8):
            write_tone(folder / f"{i}.wav", seconds=0.5 + 0.2 * i, frequency=200 * (i + 1))
            file.write(json.dumps(QUESTION | {"id": i, "answer": i % 3, "audio_path": f"{i}.wav"}) + "\n")
    return folder / "train.jsonl"


def write_rows(folder: Path, *rows) -> Path:
    """A training file of rows given as objects, text or bytes."""
    path = folder / "train.jsonl"
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_tone(path: Path, seconds: float, frequency: float = 440.0, rate: int = 16_000, channels: int = 1, **format):
    """A quiet tone in noise, as a real audio file."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(int(frequency)).normal(scale=0.01, size=len(time))
    tone = (0.3 * np.sin(2 * np.pi * frequency * time) + noise).astype(np.float32)
    soundfile.write(path, np.stack([tone * (1 - 0.2 * i) for i in range(channels)], axis=1), rate, **format)


def content_digest(records: list[dict]) -> str:
    """By which MMAU's contents are told apart, as its definition says."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    rows = [[record["question"], record["choices"], record["answer"]] for record in records]
    return digest(" ".join(sorted(digest(json.dumps(row)) for row in rows)))[:16]


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a training script in this process, `script("train.py", *flags)`, without drawing its curves, which takes
    longer than its steps. Returns exit status and standard error."""

    def script(name: str, *flags: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [name, *map(str, flags)])
        monkeypatch.setattr("run.curves.plot_curves", lambda *_: None)
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "src" / name), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        else:
            status = 0
        return status, capsys.readouterr().err

    return script
