"""What several test files use: where the reference material lies, and small real models."""

import os
from pathlib import Path

# Before torch and transformers are imported: no network, and no thread pool larger than the work.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # reference material that may lie beside a checkout; third parties' data, not ours


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (recorded reference models and real clips), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(shared, tmp_path_factory) -> Path:
    """A folder with a Qwen2-Audio of random weights, shrunk in width and depth, and the real processor."""
    import torch
    from transformers import AutoProcessor, GenerationConfig, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

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
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return folder
