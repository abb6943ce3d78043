"""questions.py: question files, and which release they are of."""

import json
from pathlib import Path

import pytest

from dataset.questions import RELEASES, Benchmark, load_questions, recognise_release


def row(number=1, **changes):
    return {
        "id": f"{number}", "audio_id": f"./test-mini-audios/{number}.wav", "question": "What?", "choices": ["a", "b"],
        "answer": "a", "task": "sound", "split": "test-mini", "difficulty": "easy",
    } | changes  # fmt: skip


def load(tmp_path, rows):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return load_questions(tmp_path / "rows.json")


@pytest.fixture
def versions(shared) -> list[dict]:
    """Every content that MMAU's repository had, with its date, its digest and its rows' hashes."""
    return json.loads((shared / "data" / "mmau" / "versions.json").read_text())


def test_every_content_of_mmaus_repository_is_known(versions):
    first = {version["digest"]: version["date"] for version in versions[::-1]}
    assert {digest: release.split(" of ")[1] for digest, release in RELEASES.items()} == first


def test_a_draft_is_not_the_original(versions):
    releases = {version["date"]: RELEASES[version["digest"]] for version in versions}
    original = {
        date
        for date, release in releases.items()
        if Benchmark("mmau_mini", release, "", True, [], Path(), []).is_original
    }
    assert original == {date for date in releases if date < "2025-05-15"}
    drafts = {date for date, release in releases.items() if release == f"v05.15.25-draft of {date}"}
    assert drafts == {f"2025-05-{day}" for day in (15, 16, 18, 19)}


def test_a_release_is_recognised_by_all_of_its_questions(shared):
    rows = json.loads((shared / "data" / "mmau" / "mmau-test-mini.json").read_text())
    newest = "v05.15.25 of 2025-08-09"
    without_ids = [{key: value for key, value in row.items() if key != "id"} for row in rows]  # as early files are
    assert recognise_release(rows) == recognise_release(rows[::-1]) == recognise_release(without_ids) == newest
    changed = [rows[0] | {"answer": "None"}, *rows[1:]]
    assert recognise_release(changed) == recognise_release(rows[1:]) == "unrecognised"


def test_the_title_names_release_and_date(shared):
    benchmark = load_questions(shared / "data" / "mmau" / "mmau-test-mini.json")
    assert benchmark.title == f"MMAU test-mini, release v05.15.25 of 2025-08-09, 1000 questions ({benchmark.digest})"


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
    assert load(tmp_path, [row(split="shifted")]).name == "mmau_shifted"
    assert load(tmp_path, [row(split="../x")]).name == load(tmp_path, [row(split=7.5)]).name == "mmau_mini"


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
    "change",
    [
        {"question": ""},
        {"choices": "a, b"},
        {"audio_id": None},
        {"id": "1"},
        {"id": "\ud800"},
        {"answer": " "},
        {"answer": None},
    ],
)
def test_bad_rows_are_named(tmp_path, change):
    with pytest.raises(ValueError, match=r"(?s)rows\.json.*row 2"):
        load(tmp_path, [row(1), row(2, **change)])


def test_rows_that_break_a_rule_are_asked_and_listed(tmp_path):
    faults = {"answer": "z"}, {"choices": ["a"]}, {"choices": [["a"], "b"]}, {"choices": ["a", "a"]}
    found = load(tmp_path, [row(number, **fault) for number, fault in enumerate(faults, start=1)]).faults
    assert [fault.split(": ")[0] for fault in found] == ["row 1 (1)", "row 2 (2)", "row 3 (3)"]
    assert not load(tmp_path, [row(1, answer="", split="test")]).faults, "there it is as it should be"


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match="rows.json"):
        load(tmp_path, [])


def test_rows_to_skip_are_not_read_and_the_others_keep_their_numbers(tmp_path):
    good = {"id": "a", "audio_id": "a.wav", "question": "What?", "choices": ["x", "y"], "answer": "x"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(good), "{broken", "", json.dumps(good | {"id": "b"})]))
    assert [question.id for question in load_questions(path, skip={2}).questions] == ["a", "b"]
    path.write_text("\n".join([json.dumps(good), "{broken", "", json.dumps(good | {"id": "b", "answer": ""})]))
    with pytest.raises(ValueError, match="(?s)rows.jsonl.*row 4"):
        load_questions(path, skip={2})
