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
