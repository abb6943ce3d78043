"""What the pages say exists: commands and their flags, paths, links, quoted tests and names, metrics, figures.

Nothing is trained or evaluated: commands are parsed by the scripts' own parsers. `data/README.md` has its own test in
`test_check.py` as well.
"""

import argparse
import re
import runpy
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from trl import GRPOConfig

import test_mmau
import train
import train_sft
from conftest import ROOT
from dataset.dataset import load_train_dataset
from dataset.questions import load_questions
from running import run
from trainer.grpo_trainer import AudioGRPOTrainer
from utils.rewards import accuracy_reward, format_reward

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCHERS = sorted(ROOT.glob("*.sh"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
# Paths that a run makes, or a person brings.
MADE = ("exp/", "data/AVQA", "data/MMAU", "data/demo", ".venv", "/models/")
ELSEWHERE = {"src/model/NAME.py", "LICENCE.txt"}  # a placeholder; another repository's
HISTORY = {"docs/LOG.md", "CHANGELOG.md"}  # they name what was there in their day
each_page = pytest.mark.parametrize("page", PAGES)


# Flags


def known_flags() -> set[str]:
    """Every option of the programs that launchers start, as it stands in their argparse declarations."""
    flags = {option for parser in (train.make_parser(), get_args_parser()) for option in parser._option_string_actions}
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("benchmarks/*.py")]:
        flags |= set(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", path.read_text(encoding="utf-8")))
    return flags


@pytest.mark.parametrize(
    "text", [*TEXTS.values(), *(path.read_text() for path in LAUNCHERS)], ids=[*TEXTS, *(p.name for p in LAUNCHERS)]
)
def test_flags_exist(text):
    # Of the tools that the set-up calls; `--flag value` in a usage line.
    pip_and_python = {"--quiet", "--version", "--no-deps", "--flag"}
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - pip_and_python
    assert used <= known_flags(), used - known_flags()


# Commands


def commands(text: str) -> list[str]:
    """Those in blocks of shell, and those in the middle of a sentence or table."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = re.findall(
        r"`((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*(?:(?:time )?sh|bash|python) [^`]+)`", outside.replace("\n", " ")
    )
    return [line for line in [*lines, *spans] if line.split("#")[0].strip()]


def parse_command(command: str) -> None:
    """Raise or exit where a command would for its words alone. Words like FILE or N stand for what a person puts there."""
    words = shlex.split(command.removeprefix("time "), comments=True)
    while "=" in words[0]:
        name = words.pop(0).partition("=")[0]
        assert any(re.search(rf"\b{name}=", path.read_text()) for path in LAUNCHERS), f"{name}: of no launcher"
    words = ["1" if re.fullmatch("[A-Z_]+", word) else word for word in words]
    program, script, *arguments = words
    if program in ("sh", "bash"):
        assert (ROOT / script).is_file(), script
        if arguments[:1] == ["demo"]:
            assert script in ("run_grpo.sh", "test_mmau.sh")
            arguments.pop(0)
        if script == "run_tests.sh":
            check_pytest(arguments)
        elif parse := {"run_grpo.sh": parse_training(train), "run_sft.sh": parse_training(train_sft)}.get(script):
            parse(arguments)
        elif script == "test_mmau.sh":
            test_mmau.parse_args(["--model_path", "exp/model/checkpoint-1", *arguments])
        else:
            assert not arguments, f"{script} takes none"
    elif script == "-m":
        assert arguments in (["mypy"], ["venv", ".venv"]) or arguments[:2] == ["pip", "install"], command
    else:
        parse_script(ROOT / script, arguments)


def parse_training(script):
    def parse(arguments: list[str]) -> None:
        if "--help" not in arguments:
            script.make_parser().parse_args_and_config(["--use_cpu", "true", *arguments])

    return parse


def parse_script(path: Path, arguments: list[str]) -> None:
    """Have a script's own parser read the arguments, and nothing else happen."""
    assert path.is_file(), f"there is no {path.relative_to(ROOT)}"
    if path.name in ("train.py", "train_sft.py"):
        return parse_training({"train.py": train, "train_sft.py": train_sft}[path.name])(arguments)

    class Parsed(Exception):
        pass

    def parse_args(parser, given=None, namespace=None):
        whole(parser, given or arguments, namespace)
        raise Parsed

    module = runpy.run_path(str(path), run_name="parsed")
    whole = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        (module.get("parse_args") or module["main"])()


def check_pytest(arguments: list[str]) -> None:
    """`-m` and `-k` with an expression, and files that exist."""
    words = iter(arguments)
    for word in words:
        assert word in ("-m", "-k", "-s", "-q") or (ROOT / word.partition("::")[0]).is_file(), word
        if word in ("-m", "-k"):
            next(words)


@each_page
def test_commands_parse(page):
    others = ("pytest ", "pre-commit ")
    for command in commands(TEXTS[page]):
        if not command.startswith(others):
            try:
                parse_command(command)
            except (SystemExit, AssertionError, ValueError) as error:
                raise AssertionError(f"{page}: {command}: {error!r}") from error


def test_the_pages_have_commands():
    assert len(commands(README)) > 25 and len(commands(TEXTS["CONTRIBUTING.md"])) >= 4


@pytest.mark.parametrize(
    "command",
    [
        "sh run_gone.sh",
        "sh run_grpo.sh --no_such_flag 1",
        "sh run_grpo.sh --beta much",
        "sh test_mmau.sh --hear nothing",
        "sh run_sft.sh --prompt_style loud",
        "sh run_tests.sh tests/test_gone.py",
        "python src/report.py",
        "python src/utils/show_acc.py -i exp/model --compare 300",
        "python src/gone.py",
        "NO_SUCH_VARIABLE=1 sh run_grpo.sh",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((SystemExit, AssertionError, ValueError)):
        parse_command(command)


# Paths, links, names


@each_page
def test_paths_exist(page):
    if page in HISTORY:
        pytest.skip("names what was there in its day")
    named = set(
        re.findall(r"(?<![\w/.-])((?:src|data|conf|docs|tests|benchmarks)/[\w./-]*\w|\w+\.(?:sh|md|txt))", TEXTS[page])
    )
    missing = {path for path in named if not (ROOT / path).exists() and not path.startswith(MADE)}
    # A file named without its folder is meant where the sentence says; it must at least exist somewhere.
    missing = {path for path in missing if "/" in path or not list(ROOT.rglob(path))} - ELSEWHERE
    assert not missing


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in headings(file.read_text(encoding="utf-8")), f"{page}: {target}"


@each_page
def test_quoted_tests_exist(page):
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    for file, name in re.findall(r"tests/(\w+\.py)::(\w+)", TEXTS[page]):
        assert f"\ndef {name}(" in tests[file], f"{page}: {file}::{name}"
    named = set(re.findall(r"(?<![\w/:])(test_\w+)(?![\w.]|/)", TEXTS[page])) - {"test_mmau"}
    for name in named:
        folder_of_results = re.fullmatch(r"test_(\d+|STEP|LABEL)", name)
        assert folder_of_results or any(f"\ndef {name}(" in text for text in tests.values()), f"{page}: {name}"


def test_each_line_of_the_ledger_names_its_test():
    ledger = README.partition("## Differences from the original")[2].partition("\n## ")[0]
    rows = [line for line in ledger.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows[1:]:
        what, why, pinned = re.split(r"(?<!\\)\|", row.strip("| "))
        assert what.strip() and why.strip() and re.fullmatch(r" `tests/\w+\.py::\w+`", pinned), row


def test_the_way_through_the_rooms_names_what_is_there():
    steps = re.findall(r"(?m)^\|[^|]+\| `(src/[\w/]+\.py)` \| (.+) \|$", TEXTS["CONTRIBUTING.md"])
    assert len(steps) > 20
    for path, names in steps:
        text = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(?m)^ *(def|class) {name}\b", text), f"{path} defines no {name}"


# The list of files


def listed_files() -> set[str]:
    """What docs/FILES.md names, as paths; a folder ends in `/` and stands for all that is in it.

    A line's first column is `src/a.py, src/b.py` or `src/trainer/a.py, b.py` (of the folder before); the second may
    name files: of the first column's folder, or of the root.
    """
    block = re.search(r"```\n(.*?)```", TEXTS["docs/FILES.md"], re.DOTALL)[1]
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
    assert not missing, f"named in docs/FILES.md, not there: {missing}"
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the project is asked of git, and this is no checkout")
    tracked = run("git", "ls-files", "src", "data", "conf", "docs/*.md", "benchmarks", "*.sh").stdout.splitlines()
    # Where single files of a folder are named, all have to be.
    detailed = {name.rpartition("/")[0] + "/" for name in listed if not name.endswith("/")}
    whole = tuple(name for name in listed if name.endswith("/") and name not in detailed)
    files = {name for name in tracked if not name.endswith("__init__.py")}
    unnamed = {name for name in files - listed if not name.startswith(whole)}
    assert not unnamed, f"not in docs/FILES.md: {sorted(unnamed)}"


# Figures


def test_figures_are_those_of_the_log():
    """Seconds, minutes and ratios in the README stand in the log, and so do the memory table's GiB in theirs."""
    figures = set(re.findall(r"\b(\d+\.\d{2,} s|\d+ min \d+ s|\d+\.\d times|\d+ min)\b", README))
    assert len(figures) >= 5
    assert figures <= set(re.findall(r"\b(\d+\.\d+ s|\d+ min \d+ s|\d+\.\d times|\d+ min)\b", TEXTS["docs/LOG.md"]))
    memory = re.findall(r"(?m)^\| \d x .* \| ([\d.]+) \|$", README)
    assert len(memory) >= 5 and all(f" {figure} fits" in TEXTS["docs/MEMORY.md"] for figure in memory)
    # The demo's table: what GRPO and the others came to, as the log has it.
    totals = re.findall(r"(?m)^ *(?:sft|warm_start|untrained|\d+) .* (\d+\.\d\d) \(264\)", README)
    assert len(totals) == 7 and all(total in TEXTS["docs/LOG.md"] for total in totals)


def test_the_papers_results_are_the_papers():
    rows = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| \**([\d.]+)\** \|", README)
    assert rows == re.findall(r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| `", TEXTS["docs/PAPER.md"])


def test_pages_are_short_and_pictures_small():
    assert len(README.splitlines()) < 300 and len(TEXTS["CONTRIBUTING.md"].splitlines()) < 100
    pictures = [*(ROOT / "docs" / "img").iterdir()]
    linked = {page: re.findall(r"\((?:docs/)?img/([\w.]+)\)", text) for page, text in TEXTS.items()}
    assert {path.name for path in pictures} == {name for names in linked.values() for name in names}
    assert all(path.stat().st_size < 150_000 for path in pictures)


def test_the_drawing_is_legible_in_both_colour_schemes():
    """It colours nothing in but one scheme."""
    drawing = (ROOT / "docs" / "img" / "shared_prompt.svg").read_text(encoding="utf-8")
    light, dark = drawing.partition("<style>")[2].partition("</style>")[0].split("@media (prefers-color-scheme: dark)")
    coloured = re.findall(r"([\w.]+) \{[^}]*(?:fill|stroke): #", light)
    assert set(coloured) == set(re.findall(r"([\w.]+) \{[^}]*(?:fill|stroke): #", dark)) and len(coloured) >= 6
    assert set(re.findall(r'class="(\w+)"', drawing)) <= set(re.findall(r"\.(\w+) \{", light))


# Metrics


def test_every_logged_metric_is_explained(small_model, questions, tmp_path):
    """A step with all that adds metrics: a reference, resampling, questions asked in training."""
    args = GRPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_completion_length=4, max_steps=1, beta=0.1,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", eval_strategy="steps", eval_steps=1, logging_steps=1,
    )  # fmt: skip
    trainer = AudioGRPOTrainer(
        str(small_model), [accuracy_reward, format_reward], args, load_train_dataset(questions), max_resample_rounds=1,
        eval_questions=load_questions(questions),
    )  # fmt: skip
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry} - {"step"}
    logged = {re.sub(r"^eval_accuracy_\w+$", "eval_accuracy_sound", key) for key in logged}
    explained = set(re.findall(r"`([\w/]+)`", TEXTS["docs/METRICS.md"]))
    assert {"kl", "groups/uniform_share", "eval_accuracy_sound", "clips/replaced"} <= logged
    assert logged <= explained, f"not in docs/METRICS.md: {sorted(logged - explained)}"
    of_the_readme = re.findall(r"(?m)^\| (`[\w/`, ]+) \|", README.partition("## Looking at a run")[2])
    shown = {name for cell in of_the_readme for name in re.findall(r"`([\w/]+)`", cell)}
    assert len(shown) > 8 and shown <= explained
