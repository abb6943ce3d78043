"""What the README says exists: its paths, the launchers it names, and every flag it or a launcher uses."""

import re
import shlex
from itertools import dropwhile

import pytest
from torch.distributed.run import get_args_parser

from conftest import ROOT
from running import run
from train import make_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCHERS = sorted(ROOT.glob("*.sh"))
# Paths that a run makes, or a person brings.
MADE = ("exp/", "data/AVQA/", "data/MMAU/", "data/demo/", ".venv", "/models/")


def known_flags() -> set[str]:
    """Every option of the programs that launchers start, as it stands in their argparse declarations."""
    flags = {option for parser in (make_parser(), get_args_parser()) for option in parser._option_string_actions}
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("data/*.py")]:
        flags |= set(re.findall(r"[\"'](--[a-z][a-z_-]*)[\"']", path.read_text(encoding="utf-8")))
    return flags


def test_paths_exist():
    named = set(
        re.findall(r"(?<![\w/.])((?:src|data|conf|docs|tests|benchmarks)/[\w./-]*\w|\w+\.(?:sh|md|txt))", README)
    )
    assert len(named) > 15
    missing = {path for path in named if not (ROOT / path).exists() and not path.startswith(MADE)}
    # A file named without its folder is meant where the sentence says; it must at least exist somewhere.
    missing = {path for path in missing if "/" in path or not list(ROOT.rglob(path))}
    assert not missing


def listed_files() -> set[str]:
    """What README's file list names, as paths; a folder ends in `/` and stands for all that is in it.

    A line's first column is `src/a.py, src/b.py` or `src/trainer/a.py, b.py` (of the folder before); the second may
    name files: of the first column's folder, or of the root.
    """
    block = re.search(r"## Files\n+```\n(.*?)```", README, re.DOTALL)[1]
    listed = set()
    for line in block.splitlines():
        column, _, about = re.match(r"(.*?\S)(  +|$)(.*)", line).groups()
        folder = ""
        for name in column.split(", "):
            folder = name[: name.rindex("/") + 1] if "/" in name else folder
            listed.add(name if "/" in name else folder + name)
        for name in re.findall(r"\b\w+\.(?:py|md|sh)\b", about):
            listed.add(folder + name if (ROOT / folder / name).exists() else name)
    return listed


def test_the_file_list_is_complete():
    listed = listed_files()
    assert {"run_sft.sh", "launch.sh", "src/train.py", "src/trainer/saving.py", "data/make_demo.py"} <= listed
    missing = {name for name in listed if not (ROOT / name).exists()}
    assert not missing, f"named in README, not there: {missing}"
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the project is asked of git, and this is no checkout")
    tracked = run("git", "ls-files", "src", "data", "conf", "docs", "benchmarks", "*.sh").stdout.splitlines()
    # Where single files of a folder are named, all have to be.
    detailed = {name.rpartition("/")[0] + "/" for name in listed if not name.endswith("/")}
    whole = tuple(name for name in listed if name.endswith("/") and name not in detailed)
    files = {name for name in tracked if not name.endswith("__init__.py")}
    unnamed = {name for name in files - listed if not name.startswith(whole)}
    assert not unnamed, f"not in README's file list: {sorted(unnamed)}"


@pytest.mark.parametrize(
    "text", [README, *(path.read_text() for path in LAUNCHERS)], ids=["README.md", *(p.name for p in LAUNCHERS)]
)
def test_flags_parse(text):
    pip_and_python = {
        "--quiet",
        "--version",
        "--flag",
    }  # of the tools that the set-up calls; `--flag value` in a usage line
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*\w", text)) - pip_and_python
    assert used <= known_flags(), used - known_flags()


def test_commands_of_the_readme_are_launchers_or_scripts_that_exist():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert commands
    for command in commands:
        words = list(dropwhile(lambda word: "=" in word, shlex.split(command)))  # without the environment in front
        assert words[0] in ("sh", "python") and (ROOT / words[1]).is_file(), command
