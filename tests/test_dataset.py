"""The JSONL loader: the original's prompts and solutions, paths, and a message for every kind of bad row."""

import json
from pathlib import Path

import pytest

from conftest import QUESTION, write_rows
from dataset.dataset import load_train_dataset

PROMPTS = json.loads((Path(__file__).parent / "fixtures" / "prompts.json").read_text(encoding="utf-8"))["cases"]
GOOD = QUESTION | {"answer": 1, "audio_path": "clips/a.wav"}


@pytest.mark.parametrize("style", ["answer", "think"])
def test_prompts_and_solutions_equal_the_originals(tmp_path, style):
    dataset = load_train_dataset(write_rows(tmp_path, *(case["row"] for case in PROMPTS)), style)
    assert dataset["prompt"][:] == [case[style]["text"] for case in PROMPTS]
    assert dataset["solution"][:] == [case[style]["solution"] for case in PROMPTS]
    assert set(dataset["style"]) == {style}
    assert dataset["row"][:] == list(range(1, len(PROMPTS) + 1))


def test_only_avqas_questions_have_their_video_replaced(tmp_path):
    rows = [GOOD, GOOD | {"dataset_name": "MMAU"}, GOOD | {"question_text": "Videos of video?"}]
    prompts = load_train_dataset(write_rows(tmp_path, *rows))["prompt"][:]
    assert [text.split(" Please")[0] for text in prompts] == [
        "What is in the audio?",
        "What is in the video?",
        "Videos of audio?",
    ]


def test_audio_paths(tmp_path, monkeypatch):
    (tmp_path / "data" / "clips").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "both.wav").touch()
    (tmp_path / "data" / "both.wav").touch()
    (tmp_path / "data" / "clips" / "a.wav").touch()
    monkeypatch.chdir(tmp_path / "here")
    paths = [str(tmp_path / "x.wav"), "both.wav", "clips/a.wav"]
    file = write_rows(tmp_path / "data", *(GOOD | {"audio_path": path} for path in paths))
    assert load_train_dataset(file)["audio_path"][:] == [
        str(tmp_path / "x.wav"),
        str(tmp_path / "here" / "both.wav"),
        str(tmp_path / "data" / "clips" / "a.wav"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        "",
        "{not json",
        '{"a": 1} {"b": 2}',
        "[1, 2]",
        json.dumps(GOOD).encode("utf-16"),
        b'{"question_text": "caf\xe9"}',
        *({k: v for k, v in GOOD.items() if k != key} for key in GOOD),
        GOOD | {"answer": 3},
        GOOD | {"answer": -1},
        GOOD | {"answer": "1"},
        GOOD | {"answer": True},
        GOOD | {"multi_choice": "dog"},
        GOOD | {"multi_choice": ["dog", None]},
        GOOD | {"audio_path": ""},
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(tmp_path, row):
    path = write_rows(tmp_path, GOOD, row, GOOD)
    with pytest.raises(ValueError) as error:
        load_train_dataset(path)
    assert f"{path}, line 2: " in str(error.value)


def test_no_file_no_rows_and_an_unknown_style(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        load_train_dataset(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="train.jsonl"):
        load_train_dataset(write_rows(tmp_path))
    with pytest.raises(ValueError, match="loud"):
        load_train_dataset(write_rows(tmp_path, GOOD), "loud")


def test_more_rows_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.dataset.ROWS_PER_CHUNK", 3)
    dataset = load_train_dataset(write_rows(tmp_path, *(GOOD | {"answer": i % 3} for i in range(8))))
    assert dataset["row"][:] == list(range(1, 9))
    assert [solution[8:11] for solution in dataset["solution"]] == ["dog", "cat", "bel"] * 2 + ["dog", "cat"]
