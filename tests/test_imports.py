"""The layers of src: imports go one way, and few files name Qwen2-Audio's own parts."""

import re

import pytest

from conftest import ROOT

SRC = ROOT / "src"
LAYERS = ("dataset", "model", "evaluation", "trainer")  # each imports itself and those before it
TOP = ("baselines", "run")  # import all layers, and not each other
IMPORT = re.compile(r"^\s*(?:from|import) \.*(\w+)", re.MULTILINE)
PARTS = re.compile(r"\b(Qwen2Audio\w+|audio_tower|multi_modal_projector|language_model|lm_head|embed_positions)\b")
MODEL_FILES = ("model/", "dataset/encode.py", "evaluation/decoding.py", "evaluation/checkpoints.py", "run/vllm.py")
each_file = pytest.mark.parametrize("file", sorted(str(path.relative_to(SRC)) for path in SRC.rglob("*.py")))


@each_file
def test_imports_go_one_way(file):
    layer = file.partition("/")[0]
    forbidden = {path.stem for path in SRC.glob("*.py")}  # scripts
    if layer in LAYERS:
        forbidden |= {*LAYERS[LAYERS.index(layer) + 1 :], *TOP, "utils"}
    elif layer in TOP:
        forbidden |= {*TOP} - {layer} | ({"utils"} if layer == "baselines" else set())
    assert not forbidden & set(IMPORT.findall((SRC / file).read_text(encoding="utf-8")))


@each_file
def test_few_files_name_the_models_parts(file):
    assert file.startswith(MODEL_FILES) or not PARTS.search((SRC / file).read_text(encoding="utf-8"))
