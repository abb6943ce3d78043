"""The pages are true: their commands parse, their flags, variables, paths, links and quoted tests exist."""

import argparse
import re
import runpy
import shlex
import sys

import pytest

import test_mmau
import train
import train_sft
from conftest import ROOT
from run.arguments import Parser, parse

LAUNCHERS = [*ROOT.glob("*.sh"), ROOT / "run_grpo.slurm", ROOT / "benchmarks/gpu.sh", ROOT / "src/run/launch.py"]
VARIABLES = {name for path in LAUNCHERS for name in re.findall(r"\b[A-Z_]{2,}\b", path.read_text(encoding="utf-8"))}
PAGES = ["README.md", "CONTRIBUTING.md", "data/README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
PAGES.remove("docs/LOG.md")  # names what existed at its time
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
# Paths that a run or a user makes, and a placeholder.
MADE = ("exp/", "data/AVQA", "data/MMAU", "data/demo", "src/model/NAME.py", "conf/universal.json", "LICENCE.txt")
PARTS = {
    "train": (train.DataArguments, train.RewardArguments, train.RecipeConfig, train.AudioModelConfig),
    "train_sft": (train_sft.ChoiceDataArguments, train_sft.SFTRecipeConfig, train_sft.AudioModelConfig),
}
OTHERS = {"--flag", "--input_folder", "--output_folder", "--inject_missing_state"}  # a placeholder, DeepSpeed's
TRAINS = {"run_grpo.sh": "train", "src/train.py": "train", "run_sft.sh": "train_sft", "src/train_sft.py": "train_sft"}
each_page = pytest.mark.parametrize("page", PAGES)


def commands(text: str) -> list[str]:
    """The lines of shell blocks, and the commands within sentences and tables."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " ")
    spans = re.findall(r"`((?:[A-Z_]+=(?:\"[^\"]*\"|\S*) )*(?:sh|python) [^`]+)`", outside)
    return [line for line in lines + spans if re.match(r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S*) )*(?:sh|python) ", line)]


def parse_command(command: str) -> None:
    """Raise an error where a command has a wrong script, variable, flag or value. Capitals stand for a user's value."""
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        assert words.pop(0).partition("=")[0] in VARIABLES
    program, script, *arguments = ["1" if re.fullmatch("[A-Z_]+", word) else word for word in words]
    if script == "-m":
        assert program == "python" and arguments[0] in (
            "mypy",
            "venv",
            "pip",
            "pytest",
            "deepspeed.checkpoint.ds_to_universal",
        )
        return
    assert (ROOT / script).is_file(), script
    if arguments[:1] == ["demo"]:
        assert script in ("run_grpo.sh", "test_mmau.sh")
        arguments.pop(0)
    if script in TRAINS:
        if "--help" not in arguments:
            parse(PARTS[TRAINS[script]], argv=["--use_cpu", "true", *arguments])
    elif script == "test_mmau.sh":
        test_mmau.parse_args(["--model_path", "exp/model/checkpoint-1", *arguments])
    elif script == "run_tests.sh":
        assert all((ROOT / word).is_file() for word in arguments if word.startswith("tests/"))
    elif program == "sh" or script.startswith("tests/"):
        assert not arguments, f"{script} takes no arguments"
    else:
        parse_by_script(script, arguments)


def parse_by_script(script: str, arguments: list[str]) -> None:
    """Have a script's own parser read the arguments, and stop there."""

    class Parsed(Exception):
        pass

    def parse_args(parser, given=None, namespace=None):
        usual(parser, given or arguments, namespace)
        raise Parsed

    usual = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(sys, "path", [str(ROOT / "src"), *sys.path])  # scripts replace the first entry
        module = runpy.run_path(str(ROOT / script), run_name="parsed")
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        (module.get("parse_args") or module["main"])()


@each_page
def test_commands_parse(page):
    for command in commands(TEXTS[page]):
        try:
            parse_command(command)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {command}: {error!r}") from error


@pytest.mark.parametrize(
    "command",
    [
        "sh run_gone.sh", "sh run_grpo.sh --no_such_flag 1", "sh run_grpo.sh --beta much", "sh test_mmau.sh --hear nothing",
        "sh run_sft.sh --prompt_style loud", "python src/report.py", "NO_SUCH_VARIABLE=1 sh run_grpo.sh",
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(command):
    with pytest.raises((Exception, SystemExit)):
        parse_command(command)


@each_page
def test_flags_exist(page):
    """Also outside commands."""
    known = {flag for parts in PARTS.values() for flag in Parser(parts)._option_string_actions} | OTHERS
    for path in (
        path for folder in ("src", "data", "demo", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
    ):
        known |= set(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", path.read_text(encoding="utf-8")))
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXTS[page])) - known


@each_page
def test_paths_and_links_exist(page):
    text = TEXTS[page]
    for path in set(re.findall(r"(?<![\w/.-])(?:src|data|demo|conf|docs|tests|benchmarks)/[\w./-]*\w", text)):
        assert path.startswith(MADE) or (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            headings = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8")) if anchor else []
            assert file.exists(), target
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], (
                target
            )
    for file, name in re.findall(r"tests/(\w+\.py)::(\w+)", text):
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"
