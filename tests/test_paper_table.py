"""The paper's table is filled from results on disk, and from nothing else."""

import json
import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT, content_digest
from dataset.questions import RELEASES
from utils.paper import PAPER, PAPER_ROW, fill_paper
from utils.show_acc import main


def rows(text: str) -> dict[str, str]:
    """Row name -> last cell, of the table's rows with a command."""
    return {row["name"]: row[0].strip("|").split("|")[-1].strip() for row in PAPER_ROW.finditer(text)}


def test_the_cells_are_empty_without_results(tmp_path):
    text, _ = fill_paper(PAPER.read_text(encoding="utf-8"), [tmp_path])
    assert len(rows(text)) == 5 and set(rows(text).values()) == {""}
    assert set(rows(PAPER.read_text(encoding="utf-8")).values()) == {""}, "a figure was written into the table by hand"


def test_commands_of_the_table_exist():
    commands = re.findall(r"`((?:[A-Z_]+=\S+ )+sh \S+\.sh[^`]*)`", PAPER.read_text(encoding="utf-8"))
    assert len(commands) == 6  # the five rows, and how a row is evaluated
    for command in commands:
        assert (ROOT / re.search(r"sh (\S+\.sh)", command)[1]).is_file()


@pytest.fixture
def grpo_answer(shared, tmp_path, monkeypatch) -> Path:
    """A run's folder with the recorded predictions as the results of two checkpoints, one of them worse."""
    items = json.loads((shared / "data" / "mmau" / "mmau-test-mini.json").read_text(encoding="utf-8"))
    monkeypatch.setitem(RELEASES, content_digest(items), "original of 2025-01-28")  # at hand is only the revised one
    recorded = json.loads((shared / "fixtures" / "mmau_eval" / "predictions_100.json").read_text(encoding="utf-8"))
    for step, spoil in ((100, False), (200, True)):
        folder = tmp_path / "grpo_answer" / f"test_{step}"
        folder.mkdir(parents=True)
        for item in items:
            item["model_prediction"] = "nothing of it" if spoil else recorded["predictions"][item["id"]]
        (folder / "res_mmau_mini.json").write_text(json.dumps(items))
    return tmp_path / "grpo_answer"


def test_the_scores_are_read_from_the_table():
    averages = [float(row["average"]) for row in PAPER_ROW.finditer(PAPER.read_text(encoding="utf-8"))]
    assert averages == [49.2, 51.8, 56.4, 64.5, 61.1]


def test_a_row_shows_its_best_checkpoint(grpo_answer, monkeypatch, capsys):
    text, skipped = fill_paper(PAPER.read_text(encoding="utf-8"), [grpo_answer])
    filled = {name: cell for name, cell in rows(text).items() if cell}
    assert list(filled) == ["GRPO + Prompt <2>"] and not skipped
    (cell,) = filled.values()
    assert re.fullmatch(r"100: 51\.35 / 49\.70 / 48\.65 / 49\.90 \(4\d\.\d\d - 5\d\.\d\d\)", cell), cell
    monkeypatch.setattr(sys, "argv", ["show_acc.py", "--paper", str(grpo_answer)])
    main()
    printed = capsys.readouterr().out
    assert cell in printed and printed.count("\n") == 7


@pytest.mark.parametrize("other", ["v05.15.25-draft of 2025-05-15", "v05.15.25 of 2025-08-09", "half", "one changed"])
def test_results_on_other_questions_are_not_filled_in(grpo_answer, monkeypatch, other):
    for file in grpo_answer.glob("test_*/res_*.json"):
        items = json.loads(file.read_text())
        if other == "half":
            items = items[:500]
        elif other == "one changed":
            items[7]["answer"] += "?"
        else:
            monkeypatch.setitem(RELEASES, content_digest(items), other)
        file.write_text(json.dumps(items))
    text, skipped = fill_paper(PAPER.read_text(encoding="utf-8"), [grpo_answer])
    assert set(rows(text).values()) == {""}
    assert len(skipped) == 2 and "grpo_answer, 100" in skipped[0]
