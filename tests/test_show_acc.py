"""show_acc.py: the table, from results on disk that may be anything."""

import hashlib
import io
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

from evaluation.collect import build_tables, read_results
from evaluation.identity import fingerprint
from evaluation.statistics import Difference, confidence_interval
from run.curves import _accuracies
from utils.show_acc import format_tables, main, to_table

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


def show(*flags) -> SimpleNamespace:
    """The command, in this process: importing its libraries again would take seconds a test."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["show_acc.py", "-i", *map(str, flags)]):
        with redirect_stdout(out), redirect_stderr(error):
            try:
                main()
            except SystemExit as end:  # with a message, which the interpreter would print
                status = 1
                print(end, file=sys.stderr)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=error.getvalue())


def test_best_first_sorted_as_numbers(folder):
    results, skipped = read_results(folder)
    assert not skipped
    table = to_table(build_tables(results)[0][1])
    counts = ["no choice", "several", "cut off"]
    assert list(table) == ["step", "sound", "music", "speech", "total", "95% interval", "to the best", *counts]
    assert list(table["step"]) == ["1000", "200", "100", "base"]  # 70, 60, 50 and 9%
    assert list(table.iloc[0, 1:5]) == ["70.00 (100)"] * 3 + ["70.00 (300)"]
    assert list(to_table(build_tables(results, "step")[0][1])["step"]) == ["100", "200", "1000", "base"]


def test_silent_and_shuffled_runs_are_rows_that_can_be_compared(folder):
    write_result(folder, "200", 120, audio="_silent")
    write_result(folder, "300", 100, audio="_shuffled")
    results, skipped = read_results(folder)
    table = to_table(build_tables(results)[0][1])
    assert list(zip(table["step"], table["audio"], strict=True)) == [
        ("1000", "real"), ("200", "real"), ("100", "real"), ("200", "silent"), ("300", "shuffled"), ("base", "real")
    ]  # fmt: skip
    assert not skipped and show(folder, "--compare", "100", "200").returncode == 0  # by its step: the one with sound
    assert "-20.00 points" in show(folder, "--compare", "200", "200 (silent)").stdout


def test_releases_do_not_share_a_table(folder):
    write_result(folder, "300", 200, questions=rows(revised=" really"))
    run = show(folder)
    assert run.returncode == 0 and "do not compare" in run.stderr
    tables = [[line.split()[0] for line in text.splitlines()[3:]] for text in run.stdout.split("\n\n")]
    assert tables == [["1000", "200", "100", "base"], ["300"]]


@pytest.mark.parametrize("key", ["clips", "records"])
def test_results_on_other_clips_or_relabelled_rows_do_not_compare(tmp_path, key):
    """The digest of the questions is the same."""
    for label, right, digest in (("50", 150, "aaaa"), ("100", 180, "aaaa"), ("200", 210, "bbbb")):
        write_result(tmp_path, label, right, **{key: digest})
    run = show(tmp_path)
    tables = run.stdout.split("\n\n")
    assert [[line.split()[0] for line in text.splitlines()[3:]] for text in tables] == [["100", "50"], ["200"]]
    assert f"{key} aaaa" in tables[0].splitlines()[0] and f"{key} bbbb" in tables[1].splitlines()[0]
    assert "do not compare" in run.stderr
    assert show(tmp_path, "--compare", "50", "100").returncode == 0
    run = show(tmp_path, "--compare", "50", "200")
    assert run.returncode == 1 and f"{key} differ" in run.stderr and not run.stdout
    assert len(read_results(tmp_path)[0]) == 3
    assert [point[0] for point in _accuracies(tmp_path, None)] in ([50, 100], [200])


def test_no_text_of_a_file_controls_the_terminal(tmp_path):
    evil = "\x1b]0;title\x07\x1b[2J\r\u202e"
    questions = rows(3)
    for row in questions:
        row |= {"id": row["id"] + evil, "task": row["task"] + evil, "question": evil, "choices": ["dog", f"cat{evil}"]}
    for label, right in (("100", 1), ("200", 3)):
        write_result(tmp_path, label, right, questions)
    write_result(tmp_path, f"300{evil}", 1, rows(2), audio="_silent")  # which is skipped
    for run in (show(tmp_path), show(tmp_path, "--compare", "100", "200"), show(tmp_path, "--compare", "100", evil)):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", run.stdout + run.stderr)
        assert "U+001B" in run.stdout + run.stderr


def test_text_is_right_aligned_and_a_task_may_be_missing(folder):
    write_result(folder, "300", 200, questions=[row for row in rows() if row["task"] != "music"])
    results, _ = read_results(folder)
    _, _, header, *lines = format_tables(results).split("\n\n")[0].splitlines()
    assert header.startswith("step        sound        music") and len({len(line) for line in [header, *lines]}) == 1
    assert lines[0].startswith("1000  70.00 (100)  70.00 (100)")


def test_styles_show_where_they_differ(folder):
    write_result(folder, "300", 200, style="think", prompt_digest="12345678")
    results, _ = read_results(folder)
    assert list(to_table(build_tables(results)[0][1]))[:2] == ["step", "prompt"]
    assert "300 (think 12345678)" in [result.name for result in results]


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
    assert [line.split()[0] for line in run.stdout.splitlines()[3:7]] == ["1000", "200", "100", "base"]


def test_an_empty_folder_and_an_absent_one(tmp_path):
    (tmp_path / "x").mkdir()
    run = show(tmp_path / "x")
    assert run.returncode == 0 and "no results" in run.stderr and run.stdout == ""
    run = show(tmp_path / "gone")
    assert run.returncode == 1 and str(tmp_path / "gone") in run.stderr and run.stderr.count("\n") == 1


def test_seeds_of_one_model_are_one_row(folder):
    for seed, right in ((1, 180), (2, 210), (3, 150)):
        questions = rows()
        file = write_result(folder, "300", right, questions, decoding="sampled", sample_seed=seed)
        for path in (file, file.with_name("run_mmau_mini.json")):
            path.rename(path.with_stem(f"{path.stem}_sample-{seed}"))
    results, skipped = read_results(folder)
    assert not skipped and len(results) == 5
    table = to_table(build_tables(results)[0][1]).set_index("step")
    assert table["total"]["300"] == "60.00 +- 10.00 (3 seeds)" and table["sound"]["300"] == "60.00 (100)"
    assert table["decoding"]["300"] == "sampled"


def test_a_copy_is_no_second_seed(folder):
    """Nor is a folder that is given twice."""
    write_result(folder, "100", 150, weights="w")
    shutil.copytree(folder / "test_100", folder / "test_100.bak")
    results, skipped = read_results(folder, f"{folder}/test_100/..")
    assert [len(result.runs) for result in results] == [1] * 4 and [result.row for result in results][0] == "100"
    assert len(skipped) == 1 and "test_100.bak" in skipped[0]


def test_results_of_another_program_are_rows_of_their_own(folder):
    """Without a run file nothing says that two are of one model."""
    for name in ("mine", "theirs", "mine_silent"):
        write_result(folder, "300", 200, audio=f"_{name}").with_name(f"run_mmau_mini_{name}.json").unlink()
    results, skipped = read_results(folder)
    found = [(result.is_real, result.model) for result in results if result.label == "300"]
    assert [real for real, _ in found] == [True, False, True] and len(set(found)) == 3 and not skipped


@pytest.mark.parametrize(
    "odd",
    [{"label": ["300"]}, {"missing": 3}, {"missing": "7"}, {"sample_seed": []}, {"files": []}, {"weights": {}},
     {"audio": 1}, {"allow_missing": []}, [], "text", None],
)  # fmt: skip
def test_a_run_file_of_another_program_is_named(folder, odd):
    write_result(folder, "300", 200).with_name("run_mmau_mini.json").write_text(json.dumps(odd))
    results, (line,) = read_results(folder)
    assert len(results) == 4 and "test_300/res_mmau_mini.json" in line and "run_mmau_mini.json" in line


def test_an_error_of_our_own_is_not_taken_for_a_bad_file(folder, monkeypatch):
    def fail(records):
        raise KeyError("a mistake")

    monkeypatch.setattr("evaluation.collect.evaluate", fail)
    with pytest.raises(KeyError):
        read_results(folder)


def test_questions_that_were_not_asked_are_counted(folder):
    write_result(folder, "300", 200, missing=["7", "8"])
    table = to_table(build_tables(read_results(folder)[0])[0][1])
    assert dict(zip(table["step"], table["not asked"], strict=True))["300"] == "2"


def test_rows_of_two_folders_carry_their_names(folder, tmp_path):
    other = tmp_path / "other"
    write_result(other, "100", 151)
    run = show(folder, other)
    names = [line.split()[0] for line in run.stdout.splitlines()[3:]]
    assert f"{folder}/100" in names and f"{other}/100" in names and len(names) == 5


def test_what_has_changed_since_it_was_written_is_left_out(folder):
    digest = hashlib.sha256(write_result(folder, "300", 200).read_bytes()).hexdigest()[:16]
    file = write_result(folder, "300", 200, files={"res_mmau_mini.json": digest})
    assert "300" in [result.label for result in read_results(folder)[0]]
    file.write_text(file.read_text().replace("cat", "dog", 1))
    results, skipped = read_results(folder)
    assert "300" not in [result.label for result in results] and str(file) in skipped[0]


def test_two_rows_are_compared_on_the_same_questions(folder):
    """1000 has 60 questions right that 100 has wrong, and none the other way round; one more is spoiled here."""
    file = folder / "test_1000" / "res_mmau_mini.json"
    records = json.loads(file.read_text())
    records[0]["model_output"] = "cat"
    file.write_text(json.dumps(records))
    run = show(folder, "--compare", "100", "1000")
    first, *changed = run.stdout.splitlines()
    assert "1000 - 100: +19.67 points" in first and "60 became right, 1 wrong" in first
    assert f"p = {2 * (1 + 61) / 2**61:.2g}" in first  # two-sided: 0 or 1 of 61 tosses
    assert len(changed) == 61 and changed[0] == "- 0: What is 0? 'dog' -> 'cat', right is 'dog'"
    assert changed[1].startswith("+ 150: ")
    table = to_table(build_tables(read_results(folder)[0])[0][1]).set_index("step")
    assert table["to the best"]["1000"] == "-" and table["to the best"]["100"].startswith("-19.67 (p 5.4e-17)")
    gone = show(folder, "--compare", "100", "7")
    assert gone.returncode == 1 and "'7'" in gone.stderr and "100, 200, 1000, base" in gone.stderr
    for label, right in (("100", 5), ("1000", 8)):  # on a second file of questions
        path = write_result(folder / "other", label, right, rows(20, "!"))
        for kind in ("res", "run"):
            name = f"{kind}_mmau_mini.json"
            (path.parent / name).rename(folder / f"test_{label}" / name.replace("mini", "shifted"))
    both = show(folder, "--compare", "100", "1000").stdout
    assert run.stdout in both and "1000 - 100: +15.00 points" in both and both.count(" questions (") == 2


def test_the_interval_of_an_accuracy_is_wilsons():
    """Figures of Newcombe (1998), table I, method 3."""
    found = [confidence_interval(right, asked) for right, asked in ((81, 263), (15, 148), (0, 20), (1, 29))]
    expected = [(25.53, 36.62), (6.24, 16.05), (0.0, 16.11), (0.61, 17.18)]
    assert [tuple(round(end, 2) for end in ends) for ends in found] == expected
    assert confidence_interval(20, 20)[1] == 100


def test_a_difference_has_an_interval_and_a_p_value_whatever_its_counts():
    """The interval covers the true difference as often as it says: here 2.5 points, of 40 questions."""
    draws = np.random.default_rng(0).multinomial(40, [0.1, 0.075, 0.825], 4000)
    ends = [Difference(int(gained), int(lost), 40).interval for gained, lost, _ in draws]
    assert 0.94 < np.mean([low <= 2.5 <= high for low, high in ends]) < 0.99
    none = Difference(0, 0, 10)
    assert none.p == "1" and none.interval[0] < 0 < none.interval[1]
    assert Difference(9000, 0, 9000).p == "<1e-99" and float(Difference(60, 1, 300).p) == pytest.approx(5.4e-17)


def test_a_row_of_other_weights_than_its_checkpoint_is_left_out(tmp_path):
    """By a sentence, while rows of deleted checkpoints stay."""
    for step, name in (("50", "checkpoint-50"), ("100", "checkpoint-100"), ("sft", "sft")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(step.encode())
        write_result(tmp_path, step, 150, weights=fingerprint(tmp_path / name))
    write_result(tmp_path, "10", 150, weights="deleted")
    assert len(read_results(tmp_path)[0]) == 4
    for name in ("checkpoint-50", "sft"):
        (tmp_path / name / "model.safetensors").write_bytes(b"others")
    results, skipped = read_results(tmp_path)
    assert [result.label for result in results] == ["10", "100"]
    assert len(skipped) == 2 and "checkpoint-50" in skipped[0] and "test_50" in skipped[0] and "sft" in skipped[1]


def test_a_table_fits_the_terminal(folder):
    for width in (40, 80, 100):
        _, _, *lines, note = format_tables(read_results(folder)[0], width=width).splitlines()
        assert all(len(line) <= width for line in lines) and lines[0].startswith("step ") and "total" in lines[0]
        assert "several, cut off" in note
    assert "too wide" not in format_tables(read_results(folder)[0])
