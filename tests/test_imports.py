"""Who may know whom in src, read from the syntax tree: the direction of imports, and who names Qwen2-Audio's own parts.

Scripts import trainer, evaluation, model and dataset, each of these only what stands further on, and command_line. Text for people
(docstrings, comments) may name what it likes. Leaves out `data/`, whose scripts stand beside all this.
"""

import ast
import re
from collections.abc import Iterator

import pytest

from conftest import ROOT

SRC = ROOT / "src"
SCRIPTS_OWN = (
    "arguments",
    "limits",
    "quiet",
    "startup",
    "utils",
    "launch",
)  # they belong to the scripts, which may all import them
ROOMS = ("command_line", "dataset", "model", "evaluation", "trainer")  # each may import itself and those before it
SCRIPTS = {path.stem for path in SRC.glob("*.py")} - set(SCRIPTS_OWN) - set(ROOMS)
MODULES = sorted(SRC.rglob("*.py"))

CLASS = re.compile("Qwen2Audio")
TOKEN = re.compile(r"<\|\w+\|>")
ATTRIBUTES = {
    "audio_tower", "multi_modal_projector", "language_model", "lm_head", "embed_positions", "audio_token",
    "audio_token_id", "audio_token_index",
}  # fmt: skip


def module_of(path) -> str:
    """`src/dataset/audio.py` -> `dataset.audio`, `src/dataset/__init__.py` -> `dataset`."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {name.partition(".")[0] for name in map(module_of, MODULES)}


def imports(path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module of ours) of every import, those inside functions too; relative ones as what they mean."""
    package = path.relative_to(SRC).parent.parts
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            start = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [".".join(filter(None, start))]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in OURS)


def wrong_imports(path, tree: ast.AST) -> list[str]:
    """What this module must not import, a line each."""
    here = module_of(path).partition(".")[0]
    allowed = {*ROOMS[: ROOMS.index(here) + 1]} if here in ROOMS else {*ROOMS, *SCRIPTS_OWN}
    found = []
    for line, name in imports(path, tree):
        if (room := name.partition(".")[0]) not in allowed:
            reason = "is a script" if room in SCRIPTS else f"stands above {here}"
            found.append(f"{path.relative_to(ROOT)}:{line}: imports {name}, which {reason}")
    return found


def model_names(path, tree: ast.AST) -> list[str]:
    """Where code names a class, attribute or token of Qwen2-Audio, a line each."""
    texts = {
        id(node.value)  # docstrings, and strings that are only comments
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Name):
            names = [node.id] if CLASS.search(node.id) else []
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr in ATTRIBUTES or CLASS.search(node.attr) else []
        elif isinstance(node, ast.alias):
            names = [node.name] if CLASS.search(node.name) else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            names = [*CLASS.findall(node.value), *TOKEN.findall(node.value)]
            # A tensor's or module's name: model.audio_tower.layers
            names += ATTRIBUTES & set(node.value.split(".")) if re.fullmatch(r"[\w.]+", node.value) else []
        found += [(node.lineno, name) for name in names]
    return [f"{path.relative_to(ROOT)}:{line}: names {name}" for line, name in sorted(set(found))]


def violations(rule, paths) -> str:
    return "\n".join(line for path in paths for line in rule(path, ast.parse(path.read_text(encoding="utf-8"))))


def test_imports_go_one_way():
    assert {"train", "train_sft", "test_mmau", "ask", "demo", "merge_lora", "plot_training", "report"} == SCRIPTS
    assert {*SCRIPTS, *SCRIPTS_OWN, *ROOMS} == OURS, "a new module or folder: say here where it stands"
    found = violations(wrong_imports, MODULES)
    assert not found, f"\n{found}"


def test_only_the_models_own_files_name_its_parts():
    own = {*(SRC / "model").glob("*.py"), SRC / "dataset" / "encode.py"}
    found = violations(model_names, [path for path in MODULES if path not in own])
    assert not found, f"\n{found}"


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        ("dataset/x.py", "from model.generation import generate", "model.generation"),
        ("dataset/x.py", "def f():\n    import utils.rewards", "utils.rewards"),
        ("model/x.py", "from ..trainer import saving", "trainer"),
        ("trainer/x.py", "from arguments import DataArguments", "arguments"),
        ("train.py", "from test_mmau import main", "test_mmau"),
        ("startup.py", "import train", "train"),
        ("utils/x.py", "import train", "train"),
        ("train.py", "import startup, utils.rewards, trainer.saving", None),
        ("trainer/x.py", "from .saving import X\nimport evaluation.mmau, transformers", None),
    ],
)
def test_a_wrong_import_is_found(module, code, wrong):
    found = wrong_imports(SRC / module, ast.parse(code))
    assert len(found) == (wrong is not None) and (not wrong or f"imports {wrong}, which" in found[0])


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import Qwen2AudioProcessor",
        "def f(processor: Qwen2AudioProcessor): ...",
        "def f(processor: 'Qwen2AudioProcessor'): ...",
        "transformers.Qwen2AudioConfig()",
        "model.model.audio_tower.eval()",
        "getattr(model, 'lm_head')",
        "name.startswith('model.audio_tower.')",
        "text + '<|im_end|>'",
        "f'{text}<|AUDIO|>'",
    ],
)
def test_a_name_of_the_model_is_found(code):
    assert len(model_names(SRC / "train.py", ast.parse(code))) == 1
    assert not model_names(SRC / "train.py", ast.parse(f'"""{code}"""\nfused_lm_head = "Qwen/Qwen2-Audio"  # {code}'))
