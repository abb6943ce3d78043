"""show_acc.py: the table, from results on disk that may be anything."""

import csv
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from utils.show_acc import build_tables, confidence_interval, format_tables, plot, read_results, to_table

TASKS = ["sound", "music", "speech"]


def rows(count=300, revised=""):
    return [
        {"id": f"{i}", "audio_id": f"{i}.wav", "question": f"What is {i}?{revised}", "choices": ["dog", "cat"], "answer": "dog",
         "task": TASKS[i % 3], "difficulty": "easy", "sub-category": "Counting", "split": "test-mini"}
        for i in range(count)
    ]  # fmt: skip


def write_result(folder: Path, label: str, right: int, questions=None, audio="", **run):
    """Results of a model that got the first `right` questions right."""
    questions = questions or rows()
    records = [row | {"model_output": "dog" if i < right else "cat"} for i, row in enumerate(questions)]
    path = folder / f"test_{label}"
    path.mkdir(parents=True, exist_ok=True)
    (path / f"res_mmau_mini{audio}.json").write_text(json.dumps(records))
    run = {"label": label, "audio": audio.removeprefix("_") or "real", "style": "answer"} | run
    (path / f"run_mmau_mini{audio}.json").write_text(json.dumps(run))
    return path / f"res_mmau_mini{audio}.json"


@pytest.fixture
def folder(tmp_path):
    for label, right in (("100", 150), ("1000", 210), ("200", 180), ("base", 27)):
        write_result(tmp_path, label, right)
    return tmp_path


def show(*flags):
    command = [sys.executable, ROOT / "src" / "utils" / "show_acc.py", "-i", *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_best_first_sorted_as_numbers(folder):
    results, skipped = read_results(folder)
    assert not skipped
    table = to_table(build_tables(results)[0][1])
    assert list(table) == ["step", "sound", "music", "speech", "total", "95% interval"]
    assert list(table["step"]) == ["1000", "200", "100", "base"]  # 70, 60, 50 and 9%
    assert list(table.iloc[0, 1:5]) == ["70.00 (100)"] * 3 + ["70.00 (300)"]
    assert list(to_table(build_tables(results, "step")[0][1])["step"]) == ["100", "200", "1000", "base"]


def test_the_interval_is_that_of_a_bootstrap_over_questions():
    low, high = confidence_interval(640, 1000)
    draw = random.Random(0)
    outcomes = [1] * 640 + [0] * 360
    means = sorted(sum(draw.choices(outcomes, k=1000)) / 10 for _ in range(2000))
    assert low == pytest.approx(means[50], abs=0.4) and high == pytest.approx(means[-51], abs=0.4)
    assert confidence_interval(640, 1000) == (low, high)
    assert confidence_interval(5, 5) == (100, 100)


def test_silent_and_shuffled_runs_show_as_drops(folder):
    write_result(folder, "200", 120, audio="_silent")
    write_result(folder, "300", 100, audio="_shuffled")
    results, skipped = read_results(folder)
    table = to_table(build_tables(results)[0][1])
    assert list(table)[-1] == "silent"
    assert dict(zip(table["step"], table["silent"], strict=True)) == {
        "1000": "-",
        "200": "40.00 (-20.00)",
        "100": "-",
        "base": "-",
    }
    assert len(skipped) == 1 and "test_300" in skipped[0]


def test_releases_do_not_share_a_table(folder):
    write_result(folder, "300", 200, questions=rows(revised=" really"))
    run = show(folder)
    assert run.returncode == 0 and "do not compare" in run.stderr
    tables = [[line.split()[0] for line in text.splitlines()[2:]] for text in run.stdout.split("\n\n")]
    assert tables == [["1000", "200", "100", "base"], ["300"]]


def test_markdown_and_csv(folder):
    results, _ = read_results(folder)
    lines = format_tables(results, style="markdown").splitlines()
    assert lines[2].startswith("| step | sound |") and lines[3] == "|---|---|---|---|---|---|"
    table = list(csv.DictReader(io.StringIO(format_tables(results, style="csv"))))
    assert [row["step"] for row in table] == ["1000", "200", "100", "base"]
    assert float(table[0]["total"]) == 70 and table[0]["sound_questions"] == "100"
    assert float(table[0]["low"]) < 70 < float(table[0]["high"])


def test_text_is_right_aligned_and_a_task_may_be_missing(folder):
    write_result(folder, "300", 200, questions=[row for row in rows() if row["task"] != "music"])
    results, _ = read_results(folder)
    _, header, *lines = format_tables(results).split("\n\n")[0].splitlines()
    assert header.startswith("step        sound        music") and len({len(line) for line in [header, *lines]}) == 1
    assert lines[0].startswith("1000  70.00 (100)  70.00 (100)")
    table = list(csv.DictReader(io.StringIO(format_tables(results, style="csv"))))
    assert [(row["music"], row["music_questions"]) for row in table[:2]] == [("70.00", "100"), ("60.00", "100")]
    assert [(row["music"], row["music_questions"]) for row in table if row["step"] == "300"] == [("", "0")]


def test_styles_show_where_they_differ(folder):
    write_result(folder, "300", 200, style="think")
    assert list(to_table(build_tables(read_results(folder)[0])[0][1]))[:2] == ["step", "style"]


def test_results_of_the_original_layout_without_run_file_are_read(tmp_path):
    file = write_result(tmp_path, "100", 150)
    file.with_name("run_mmau_mini.json").unlink()
    assert [result.label for result in read_results(tmp_path)[0]] == ["100"]


def test_nothing_it_finds_makes_it_fail(folder):
    def put(name, text):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text) if isinstance(text, str) else path.write_bytes(text)

    put("test_1/res_mmau_mini.json", "[{")
    put("test_2/res_mmau_mini.json", "[]")
    put("test_3/res_mmau_mini.json", "[1, 2]")
    put("test_4/res_mmau_mini.json", '[{"id": 1}]')
    put("test_5/res_mmau_mini.json", b"\xff\xfe\x00")
    put("test_6/res_mmau_mini.json", json.dumps(rows(3)))  # no predictions
    put("test_7/res_mmau_mini.json", json.dumps([row | {"answer": "", "model_output": "a"} for row in rows(3)]))
    put("test_8/notes.txt", "")
    put("test_9/res_mmau_mini.json.partial-0", "{}")
    put("test_10", "a file")
    put("test_11/res_mmau_mini.json", json.dumps([row | {"task": ["sound"], "model_output": "a"} for row in rows(3)]))
    put("test_12/res_mmau_mini.json", json.dumps({"some": "thing"}))
    put("test_13/res_mmau_mini.json", "[" * 100_000)
    put("test_14/res_mmau_mini.json", json.dumps([row | {"model_output": "a"} for row in rows(3)]))
    put("test_14/run_mmau_mini.json", "[]")
    run = show(folder)
    assert run.returncode == 0, run.stderr
    for number in range(1, 15):
        assert f"test_{number}" in run.stderr, number
    assert "not finished" in run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()[2:6]] == ["1000", "200", "100", "base"]


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_or_absent_folder(tmp_path, exists):
    folder = tmp_path / "x"
    if exists:
        folder.mkdir()
    run = show(folder)
    assert run.returncode == 0 and "no results" in run.stderr and run.stdout == ""


def test_plot(folder):
    pytest.importorskip("matplotlib")
    write_result(folder, "300", 200, questions=rows(revised=" really"))
    assert show(folder, "--plot").returncode == 0
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no results"):
        plot([], folder / "none.png")
