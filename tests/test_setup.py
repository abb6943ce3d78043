"""The set-up that launchers share, and the repository's own files. No network, nothing is installed."""

import json
import re
import sys
import tomllib

import yaml

from conftest import ROOT
from run.check_requirements import compare_versions, read_pins
from running import run


def test_pins_are_exact_and_installed_here():
    pins = read_pins(ROOT / "requirements-dev.txt")
    assert {"torch", "transformers", "trl", "pytest"} <= set(pins)
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or "==" in line
    lacking, _ = compare_versions(pins)
    assert lacking == []


def test_ruff_has_one_version_everywhere():
    """The pinned one, in .ci/run, which the workflow calls, and in the pre-commit hook."""
    pinned = read_pins(ROOT / "requirements-dev.txt")["ruff"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [(repo["rev"], [hook["id"] for hook in repo["hooks"]]) for repo in hooks] == [
        (f"v{pinned}", ["ruff-check", "ruff-format"])
    ]
    calls = (ROOT / ".ci" / "run").read_text()
    assert "-m ruff check\n" in calls and "-m ruff format --check\n" in calls
    steps = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]["steps"]
    assert any(".ci/run" in step.get("run", "") for step in steps)


def test_updates_are_grouped_and_trl_needs_approval():
    rules = json.loads((ROOT / "renovate.json").read_text())["packageRules"]
    grouped = {name: rule["groupName"] for rule in rules for name in rule.get("matchPackageNames", ())}
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert grouped["ruff"] == grouped[hook["repo"].removeprefix("https://github.com/")]
    assert set(grouped) - {"astral-sh/ruff-pre-commit"} <= set(read_pins(ROOT / "requirements-dev.txt"))
    asked = {name for rule in rules if rule.get("dependencyDashboardApproval") for name in rule["matchPackageNames"]}
    assert "trl" in asked
    assert any(rule.get("matchManagers") == ["pip_requirements"] for rule in rules)


def test_citation_matches_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (paper,) = citation["references"]
    assert readme.startswith(f"# {citation['title']}\n")
    assert paper["title"] in " ".join(readme.split()) and paper["url"] in readme and {"type", "authors"} <= set(paper)
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


def test_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"(?m)^## (.+)$", text)
    assert releases[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", release) for release in releases[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"(?m)^### (.+)$", text)) <= kinds


def test_git_ignores_an_environment_as_a_folder_and_as_a_link(tmp_path):
    run("git", "init", "-q", tmp_path)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".venv").symlink_to("elsewhere")
    run("git", "check-ignore", "-q", ".venv", cwd=tmp_path)
    (tmp_path / ".venv").unlink()
    (tmp_path / ".venv").mkdir()
    run("git", "check-ignore", "-q", ".venv", cwd=tmp_path)


def test_missing_packages_are_named(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text('no-such-package==1.0\ntrl==0.0.1\nnumpy==0.1\nalso-not-here==2.0; sys_platform == "plan9"\n')
    lacking, differing = compare_versions(read_pins(file))
    assert [text.partition("=")[0] for text in lacking] == ["no-such-package", "trl"]
    assert [text.partition("=")[0] for text in differing] == ["numpy"]
    done = run(sys.executable, "src/run/check_requirements.py", file, check=False)
    assert done.returncode == 1 and f"run:  python -m pip install -r {file}" in done.stdout


def test_active_environment_without_the_packages_is_not_changed(tmp_path):
    empty = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", empty)
    before = sorted(path for path in empty.rglob("*") if "__pycache__" not in path.parts)
    done = run(
        "sh",
        "run_grpo.sh",
        check=False,
        VIRTUAL_ENV=empty,
        PATH=f"{empty}/bin:/usr/bin:/bin",
        PYTHONDONTWRITEBYTECODE=1,
    )
    assert done.returncode == 1
    assert "python -m pip install -r requirements.txt" in done.stdout and "torch==" in done.stdout
    assert before == sorted(path for path in empty.rglob("*") if "__pycache__" not in path.parts)


PYTHON = """#!/bin/sh
case "$*" in
--version) echo "Python 3.11.0" ;;
"-m pip install"*) echo "$*" >> pip.log ;;
"-m venv --clear .venv")
    rm -rf .venv
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    echo "$*" >> venv.log ;;
esac
"""


def test_environment_is_made_once_and_rebuilt_without_its_python(tmp_path):
    def set_up() -> tuple[int, int]:
        """How often .venv was made and filled so far."""
        run("sh", "-euc", ". ./setup_env.sh", cwd=tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin", **inactive)
        logs = [tmp_path / "venv.log", tmp_path / "pip.log"]
        return tuple(len(log.read_text().splitlines()) for log in logs)

    inactive = dict(VIRTUAL_ENV="", CONDA_PREFIX="")
    for name in ("setup_env.sh", "requirements.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "python3.11").write_text(PYTHON)
    (tmp_path / "python3.11").chmod(0o755)
    python = tmp_path / ".venv" / "bin" / "python"
    assert set_up() == set_up() == (1, 1)
    python.unlink()
    python.symlink_to("gone")
    assert set_up() == set_up() == (2, 2)
    python.write_text(PYTHON.replace("3.11.0", "3.12.0"))
    assert set_up() == set_up() == (2, 3), "its packages are for another version"


def test_libraries_are_silenced_unless_told_otherwise():
    names = ("TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM")
    show = f"import os; print(*map(os.environ.get, {names}), sep=';')"
    shell = '. ./setup_env.sh; exec python -c "$1"'
    given = {"TRANSFORMERS_VERBOSITY": "info", "PYTHONWARNINGS": "default"}
    assert run("sh", "-euc", shell, "sh", show, **given).stdout.splitlines()[-1] == "info;default;1;false"
