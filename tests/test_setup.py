"""The set-up that launchers share, and what is said before a run: no network, nothing installed."""

import json
import re
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml
from huggingface_hub import constants

from conftest import ROOT
from launch.check_requirements import compare_versions, read_pins
from launch.preflight import find_model_problem, parse_flags
from running import run


def test_pins_are_exact_and_installed_here():
    pins = read_pins(ROOT / "requirements-dev.txt")
    assert {"torch", "transformers", "trl", "pytest"} <= set(pins)
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or "==" in line
    lacking, _ = compare_versions(pins)
    assert lacking == []


def test_style_is_checked_by_one_version_everywhere():
    """The pinned ruff in .ci/run, which the workflow calls, and the same before each commit."""
    pinned = read_pins(ROOT / "requirements-dev.txt")["ruff"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [(repo["rev"], [hook["id"] for hook in repo["hooks"]]) for repo in hooks] == [
        (f"v{pinned}", ["ruff-check", "ruff-format"])
    ]
    calls = (ROOT / ".ci" / "run").read_text()
    assert "-m ruff check\n" in calls and "-m ruff format --check\n" in calls
    steps = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]["steps"]
    assert any(".ci/run" in step.get("run", "") for step in steps)


def test_updates_move_what_belongs_together_and_ask_where_private_methods_are_overridden():
    rules = json.loads((ROOT / "renovate.json").read_text())["packageRules"]
    grouped = {name: rule["groupName"] for rule in rules for name in rule.get("matchPackageNames", ())}
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert grouped["ruff"] == grouped[hook["repo"].removeprefix("https://github.com/")]
    assert set(grouped) - {"astral-sh/ruff-pre-commit"} <= set(read_pins(ROOT / "requirements-dev.txt"))
    asked = {name for rule in rules if rule.get("dependencyDashboardApproval") for name in rule["matchPackageNames"]}
    assert "trl" in asked
    assert any(rule.get("matchManagers") == ["pip_requirements"] for rule in rules)


def test_what_is_cited_is_what_the_readme_names():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (paper,) = citation["references"]
    assert readme.startswith(f"# {citation['title']}\n")
    assert paper["title"] in " ".join(readme.split()) and paper["url"] in readme and {"type", "authors"} <= set(paper)
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"(?m)^## (.+)$", text)
    assert releases[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", release) for release in releases[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"(?m)^### (.+)$", text)) <= kinds


def test_an_environment_is_ignored_as_a_folder_and_as_a_link(tmp_path):
    run("git", "init", "-q", tmp_path)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".venv").symlink_to("elsewhere")
    run("git", "check-ignore", "-q", ".venv", cwd=tmp_path)
    (tmp_path / ".venv").unlink()
    (tmp_path / ".venv").mkdir()
    run("git", "check-ignore", "-q", ".venv", cwd=tmp_path)


def test_what_an_environment_lacks_is_named(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text('no-such-package==1.0\ntrl==0.0.1\nnumpy==0.1\nalso-not-here==2.0; sys_platform == "plan9"\n')
    lacking, differing = compare_versions(read_pins(file))
    assert len(lacking) == 2 and lacking[0] == "no-such-package==1.0 (not installed)" and "trl==0.0.1" in lacking[1]
    assert len(differing) == 1 and differing[0].startswith("numpy==0.1 (found:")
    done = run(sys.executable, "src/launch/check_requirements.py", file, check=False)
    assert done.returncode == 1 and f"run:  python -m pip install -r {file}" in done.stdout


def test_an_active_environment_without_the_packages_is_left_alone(tmp_path):
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


@pytest.mark.parametrize("model", ["./gone", "/gone/model", "~/gone", "gone", "a/b/c"])
def test_a_model_folder_that_is_not_there(model):
    assert "there is no folder" in find_model_problem(model)


def test_a_model_on_the_hub_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not in the cache" in find_model_problem("nobody/nothing")
    assert "no config.json" in find_model_problem(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert find_model_problem(str(tmp_path)) is None


class Hub(BaseHTTPRequestHandler):
    """Knows one model."""

    def do_GET(self):  # noqa: N802, http.server's name
        known = self.path == "/api/models/some/model"
        body = b'{"id": "some/model"}' if known else b"{}"
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_model_on_the_hub_with_a_network(monkeypatch, tmp_path):
    """A hub on this machine that knows one model; what is in the cache needs none."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with HTTPServer(("127.0.0.1", 0), Hub) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        assert find_model_problem("some/model") is None
        assert "gone/model is not in the cache and the hub gives RepositoryNotFoundError" in find_model_problem(
            "gone/model"
        )
        hub.shutdown()
    cached = tmp_path / "models--gone--model"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    (cached / "snapshots" / "1" / "config.json").write_text("{}")
    assert find_model_problem("gone/model") is None


def test_the_last_flag_counts():
    flags = parse_flags(["--data_file", "a", "--data_file", "b", "--config_path", "c.json", "--beta", "0", "--use_cpu"])
    assert (flags.data_file, flags.deepspeed, flags.use_cpu) == ("b", "c.json", True)
    assert not parse_flags(["--use_cpu", "false"]).use_cpu and parse_flags(["--use-cpu", "True"]).use_cpu
