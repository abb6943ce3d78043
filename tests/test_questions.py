"""questions.py: question files, and which release they are of."""

import json

import pytest

from dataset.questions import REVISED_QUESTIONS, load_questions, recognise_release, release_line


def row(number=1, **changes):
    return {
        "id": f"{number}", "audio_id": f"./test-mini-audios/{number}.wav", "question": "What?", "choices": ["a", "b"],
        "answer": "a", "task": "sound", "split": "test-mini", "difficulty": "easy",
    } | changes  # fmt: skip


def load(tmp_path, rows):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return load_questions(tmp_path / "rows.json")


def test_releases_are_recognised_from_the_questions(shared):
    rows = json.loads((shared / "data" / "mmau" / "mmau-test-mini.json").read_text())
    assert [release_line(row) for row in rows] == REVISED_QUESTIONS.read_text().split()
    assert recognise_release(rows) == recognise_release(rows[::25]) == "v05.15.25"
    # What the authors mend now and then does not make it another release; a quarter of the questions does.
    changed = [row | {"answer": row["choices"][-1]} if i % 50 == 0 else row for i, row in enumerate(rows)]
    assert recognise_release(changed) == "v05.15.25"
    changed = [row | {"question": row["question"] + " So?"} if i % 4 == 0 else row for i, row in enumerate(rows)]
    assert recognise_release(changed) == "original"
    # Early files have no ids.
    without = [{key: value for key, value in row.items() if key != "id"} for row in changed]
    assert recognise_release(without) == "original"
    assert recognise_release([row()]) == "unrecognised"


def test_the_digest_is_that_of_the_questions_in_any_order(tmp_path):
    rows = [row(1), row(2)]
    digest = load(tmp_path, rows).digest
    assert load(tmp_path, rows[::-1]).digest == digest
    assert load(tmp_path, [row(1), row(2, more="keys")]).digest == digest
    for change in ({"question": "Who?"}, {"choices": ["a", "c"]}, {"answer": "b"}, {"id": "3"}):
        assert load(tmp_path, [row(1), row(2, **change)]).digest != digest


def test_names_and_answers(tmp_path):
    assert load(tmp_path, [row()]).name == "mmau_mini" and load(tmp_path, [row()]).has_answers
    test = load(tmp_path, [row(split="test", answer="")])
    assert test.name == "mmau" and not test.has_answers
    assert load(tmp_path, [row(modality="speech")]).name == "mmar"


def test_clips_are_found_below_the_folder_or_right_in_it(tmp_path):
    assert load(tmp_path, [row()]).questions[0].audio_path == str(tmp_path / "test-mini-audios" / "1.wav")
    (tmp_path / "1.wav").touch()
    assert load(tmp_path, [row()]).questions[0].audio_path == str(tmp_path / "1.wav")


def test_files_without_ids_take_the_clips_name(tmp_path):
    rows = [row(1), row(1, question="Who?")]
    for each in rows:
        del each["id"]
    ids = [question.id for question in load(tmp_path, rows).questions]
    assert ids[0] == "1" and ids[1].startswith("1-")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": ""}, "`question`"),
        ({"choices": "a, b"}, "`choices`"),
        ({"audio_id": None}, "audio_id"),
        ({"id": "1"}, "the id 1 is that of row 1"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match="row 2.*" + message):
        load(tmp_path, [row(1), row(2, **change)])


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match="no questions"):
        load(tmp_path, [])
