"""evaluation/mmau.py: MMAU's official score, against what its own script gave (tests/fixtures, ../shared)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from dataset.rows import read_records
from evaluation.mmau import evaluate, get_prediction, string_match

CASES = json.loads((Path(__file__).parent / "fixtures" / "string_match.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case['kind']}" for number, case in enumerate(CASES)])
def test_string_match_is_that_of_the_official_script(case):
    assert string_match(case["answer"], case["prediction"], case["choices"]) == case["match"]


def record(answer="dog", prediction="dog", task="sound", difficulty="easy", **more):
    choices = ["dog", "cat", "a dog and a cat"]
    return {
        "answer": answer,
        "choices": choices,
        "task": task,
        "difficulty": difficulty,
        "model_output": prediction,
    } | more


def test_the_printed_text_in_full():
    records = [
        record(**{"sub-category": "Source"}),
        record(prediction="cat", **{"sub-category": "Counting"}),
        record(prediction="a dog", task="speech", difficulty="hard", **{"sub-category": "Source"}),
    ]
    stars = "*" * 30
    assert str(evaluate(records)) == (
        f"{stars}\nTask-wise Accuracy:\n"
        "sound : 50.00% over 2 samples\nmusic : 0.00% over 0 samples\nspeech : 0.00% over 1 samples\n"
        f"{stars}\nDifficulty-wise Accuracy:\n"
        "easy : 50.00% over 2 samples\nhard : 0.00% over 1 samples\nmedium : 0.00% over 0 samples\n"
        f"{stars}\nSub-category-wise Accuracy:\nSource : 50.00% over 2 samples\nCounting : 0.00% over 1 samples\n"
        f"{stars}\nTotal Accuracy: 33.33% over 3 samples\n"
        f"{stars}\nNo prediction count: 0\n"
    )


def test_the_official_text_for_all_1000_predictions(shared, tmp_path):
    text = json.loads((shared / "fixtures" / "mmau_eval" / "evaluation_text.json").read_text())
    questions = json.loads((shared / "data" / "mmau" / "mmau-test-mini.json").read_text())
    for case in text["cases"]:
        path = shared / "fixtures" / "mmau_eval" / f"predictions_{case['iter']}.json"
        predictions = json.loads(path.read_text())["predictions"]
        records = [row | {"model_prediction": predictions[row["id"]]} for row in questions]
        assert str(evaluate(records)) == case["stdout"]
        (tmp_path / "res.json").write_text(json.dumps(records))
        command = [sys.executable, "src/evaluation/mmau.py", "--input", tmp_path / "res.json"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert run.stdout == case["stdout"]


@pytest.mark.parametrize("change", [{}, {"model_output": None}, {"prediction": "dog"}])
def test_a_record_without_prediction_is_refused_by_name(change):
    """The official script silently omits it."""
    without = record(id="id-2")
    del without["model_output"]
    with pytest.raises(ValueError, match=r"record 2 \(id-2\)"):
        evaluate([record(), without | change])


@pytest.mark.parametrize(
    ("prediction", "named"),
    [("dog", 1), ("a dog", 1), ("a dog and a cat", 1), ("cat dog", 2), ("a horse", 0), ("", 0), ("DOG!", 1)],
)
def test_answers_that_name_no_choice_or_several_are_counted(prediction, named):
    """A choice whose words lie within a longer one that is named, too, is not meant."""
    scores = evaluate([record(prediction=prediction, model_cut_off=True), record()])
    assert (scores.no_choice, scores.several, scores.cut_off) == (named == 0, named == 2, 1)


def test_a_group_that_is_no_text_is_refused_by_name():
    with pytest.raises(ValueError, match="record 1 .*`task`"):
        evaluate([record(task=["sound"])])


def test_predictions_are_found_under_any_of_the_keys():
    assert get_prediction({"model_prediction": "a"}) == "a"
    assert get_prediction({"answer_prediction": "b"}) == "b"
    assert get_prediction({"prediction": "c"}) is None


def test_mmar_is_scored_by_modality():
    records = [
        record(task=None, difficulty=None, modality="mix-sound-speech", category="Signal Layer"),
        record(task=None, difficulty=None, modality="music", category="Signal Layer", prediction="cat"),
    ]
    scores = evaluate(records)
    assert scores.groups["Modality"]["mix-sound-speech"] == [1, 1]
    assert scores.groups["Modality"]["music"] == [0, 1]
    layers = {"Signal Layer": [1, 2]} | dict.fromkeys(["Perception Layer", "Semantic Layer", "Cultural Layer"], [0, 0])
    assert scores.groups["Category"] == layers
    assert list(scores.groups["Category"]) == list(layers)  # in the order of its script
    assert "Modality-wise Accuracy:" in str(scores) and "Task" not in str(scores)


def test_no_score_is_invented_for_blank_answers():
    with pytest.raises(ValueError, match="record 1"):
        evaluate([record(answer="")])
    without = record()
    del without["answer"]
    with pytest.raises(ValueError, match="record 1"):
        evaluate([without])


def test_read_records_takes_a_list_or_lines_and_names_what_is_wrong(tmp_path):
    path = tmp_path / "rows"
    path.write_text('[{"id": 1}, {"id": 2}]')
    assert [row["id"] for row in read_records(path)] == [1, 2]
    path.write_text('{"id": 1, "question": "two\u2028lines"}\n\n{"id": 2}\n', encoding="utf-8")
    assert [row["id"] for row in read_records(path)] == [1, 2]
    path.write_text("[1]")
    with pytest.raises(ValueError, match="row 1"):
        read_records(path)
    path.write_text('{"id": 1')
    with pytest.raises(ValueError, match="line 1"):
        read_records(path)
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none")
