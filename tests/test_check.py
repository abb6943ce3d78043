"""run/check.py: every kind of bad row and clip is dropped with its reason, every unusual but good one is kept, and memory
stays flat."""

import gc
import json
import os
import shlex
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import AutoProcessor

from conftest import QUESTION, ROOT, write_rows, write_tone
from dataset.dataset import load_train_dataset
from dataset.rows import Row
from run import check as check_module
from run.check import (
    Examined,
    Rules,
    examine_clip,
    examine_evaluation_file,
    examine_training_file,
    is_training_file,
    main,
)
from running import run
from utils.flags import at_least

GOOD = QUESTION | {"id": 1, "answer": 1, "audio_path": "good.wav"}
ITEM = {
    "id": "x",
    "audio_id": "clips/good.wav",
    "question": "What?",
    "choices": ["a", "b"],
    "answer": "b",
    "split": "test-mini",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    write_tone(tmp_path / "good.wav", 0.5)
    (tmp_path / "clips").mkdir()
    write_tone(tmp_path / "clips" / "good.wav", 0.5)
    return tmp_path


def without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}


KEYS = ("question_text", "multi_choice", "answer", "dataset_name", "audio_path")
BAD_ROWS = [
    ("", "blank line"),
    (" \t", "blank line"),
    ("{not json", "not JSON"),
    ("1" * 5000, "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ("null", "not a JSON object"),
    (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    (b'{"question_text": "caf\xe9"}', "not UTF-8"),
    *((without(GOOD, key), f"`{key}` missing") for key in KEYS),
    *((GOOD | {key: None}, f"`{key}` null") for key in KEYS),
    *((GOOD | {key: ["no text"] if key != "multi_choice" else 5}, f"`{key}` of the wrong type") for key in KEYS),
    (GOOD | {"answer": 3}, "`answer` out of range"),
    (GOOD | {"answer": -1}, "`answer` out of range"),
    (GOOD | {"answer": "1"}, "`answer` of the wrong type"),
    (GOOD | {"answer": 1.0}, "`answer` of the wrong type"),
    (GOOD | {"answer": True}, "`answer` of the wrong type"),
    (GOOD | {"multi_choice": []}, "`answer` out of range"),
    (GOOD | {"multi_choice": "dog"}, "`multi_choice` of the wrong type"),
    (GOOD | {"multi_choice": {"0": "dog"}}, "`multi_choice` of the wrong type"),
    (GOOD | {"multi_choice": ["dog"], "answer": 0}, "fewer than two choices"),
    (GOOD | {"multi_choice": ["dog", 5]}, "choice is no text"),
    (GOOD | {"multi_choice": ["dog", None]}, "choice is no text"),
    (GOOD | {"multi_choice": ["dog", ["cat"]]}, "choice is no text"),
    (GOOD | {"multi_choice": ["dog", "\ud800"]}, "broken text"),
    (GOOD | {"question_text": ""}, "question empty"),
    (GOOD | {"question_text": " \n"}, "question empty"),
    (GOOD | {"question_text": "a \udfff"}, "broken text"),
    (GOOD | {"audio_path": ""}, "`audio_path` empty"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_dropped_and_named(folder, row, reason):
    path = write_rows(folder, GOOD, row, GOOD)
    examination = examine_training_file(path)
    assert list(examination.dropped) == [2] and examination.reasons == {reason: 1}
    assert examination.examples[reason].startswith("line 2: ")
    assert reason in examination.table() and "3 rows, 2 usable, 1 dropped (33.3%)" in examination.table()
    assert load_train_dataset(path, skip=set(examination.dropped))["row"][:] == [1, 3]


def test_a_byte_order_mark_does_no_harm(folder):
    marked = b"\xef\xbb\xbf" + json.dumps(GOOD).encode()
    path = write_rows(folder, marked, GOOD, marked)  # as of files put together
    assert is_training_file(path) and examine_training_file(path).usable == len(load_train_dataset(path)) == 3


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def make_bad_clip(name: str, path: Path) -> None:
    """Put at `path` what `name` says."""
    if name in ("cut wav", "cut float wav", "cut flac", "cut mp3"):
        settings = {
            "cut wav": {},
            "cut float wav": {"subtype": "FLOAT"},
            "cut flac": {"format": "FLAC"},
            "cut mp3": {"format": "MP3"},
        }
        write_tone(path, 5.0, **{"format": "WAV"} | settings[name])
        cut(path)
    elif name == "wav cut in its header":
        write_tone(path, 1.0)
        cut(path, 0.0012)
    elif name == "wav cut after its header":
        write_tone(path, 1.0)
        path.write_bytes(path.read_bytes()[:44])
    elif name == "folder":
        path.mkdir()
    elif name == "empty file":
        path.touch()
    elif name == "text":
        path.write_text("RIFF is how this text begins, and it goes on for a while")
    elif name == "zero samples":
        soundfile.write(path, np.zeros(0, np.float32), 16_000, format="WAV")
    elif name == "too short":
        write_tone(path, 0.099)
    elif name == "too long":
        write_tone(path, 30.01)
    elif name in ("nan", "infinite"):
        samples = np.full(16_000, 0.1, np.float32)
        samples[8_000] = float(name.replace("infinite", "inf"))
        soundfile.write(path, samples, 16_000, subtype="FLOAT", format="WAV")
    elif name == "zeros":
        soundfile.write(path, np.zeros(16_000, np.float32), 16_000, format="WAV")
    elif name == "first channel silent":
        soundfile.write(path, np.random.default_rng(0).normal(size=(16_000, 2)) * [0, 0.1], 16_000, format="WAV")
    elif name == "damaged flac":
        write_tone(path, 5.0, format="FLAC")
        content = bytearray(path.read_bytes())
        content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
        path.write_bytes(content)
    elif name == "symlink loop":
        path.symlink_to(path.with_name("other.wav"))
        path.with_name("other.wav").symlink_to(path)
    elif name == "broken link":
        path.symlink_to("nowhere.wav")
    elif name == "pipe":
        os.mkfifo(path)
    else:
        assert name == "missing"


BAD_CLIPS = [
    ("missing", "clip missing"),
    ("broken link", "clip missing"),
    ("symlink loop", "clip missing"),
    ("folder", "clip is no audio file"),
    ("empty file", "clip is no audio file"),
    ("text", "clip is no audio file"),
    ("pipe", "clip is no audio file"),
    ("cut wav", "clip cut off"),
    ("cut float wav", "clip cut off"),
    ("cut flac", "clip cut off"),
    ("cut mp3", "clip cut off"),
    ("damaged flac", "clip cut off"),
    ("wav cut in its header", "clip is no audio file"),
    ("wav cut after its header", "clip cut off"),
    ("zero samples", "clip without samples"),
    ("too short", "clip too short"),
    ("too long", "clip too long"),
]
BAD_SAMPLES = [
    ("nan", "clip with NaN or infinite samples"),
    ("infinite", "clip with NaN or infinite samples"),
    ("zeros", "clip silent"),
    ("first channel silent", "clip silent"),
]


@pytest.mark.parametrize("deep", [False, True], ids=["headers", "deep"])
@pytest.mark.parametrize(("name", "reason"), BAD_CLIPS)
def test_a_bad_clip_is_dropped_and_named(folder, name, reason, deep):
    make_bad_clip(name, folder / "bad.wav")
    path = write_rows(folder, GOOD, GOOD | {"audio_path": "bad.wav"}, GOOD)
    examination = examine_training_file(path, Rules(deep=deep))
    assert list(examination.dropped) == [2] and examination.reasons == {reason: 1}
    assert examination.examples[reason].startswith(f"line 2: {folder / 'bad.wav'}: ")


@pytest.mark.parametrize(("name", "reason"), BAD_SAMPLES)
def test_bad_samples_are_found_by_decoding(folder, name, reason):
    make_bad_clip(name, folder / "bad.wav")
    path = write_rows(folder, GOOD, GOOD | {"audio_path": "bad.wav"}, GOOD)
    examination = examine_training_file(path, Rules(deep=True))
    assert list(examination.dropped) == [2] and examination.reasons == {reason: 1}
    if name == "first channel silent":
        assert not examine_training_file(path, Rules(deep=True, channels="mean")).dropped


def test_a_clip_that_is_too_long_is_not_decoded(folder):
    soundfile.write(folder / "bad.wav", np.full(31 * 16_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    path = write_rows(folder, GOOD | {"audio_path": "bad.wav"})
    assert examine_training_file(path, Rules(deep=True)).reasons == {"clip too long": 1}


@pytest.mark.parametrize("name", ["a\0b.wav", "\ud800.wav", "x" * 5000 + ".wav", "good.wav/b.wav"])
def test_names_that_no_file_can_have(folder, name):
    examination = examine_training_file(write_rows(folder, GOOD, GOOD | {"audio_path": name}))
    (example,) = examination.examples.values()
    assert list(examination.dropped) == [2] and len(example) < 700
    example.encode("utf-8")


FINE = {
    "plain.wav": dict(),
    "8 kHz.wav": dict(rate=8_000),
    "192 kHz.wav": dict(rate=192_000),
    "six channels.wav": dict(channels=6, rate=48_000),
    "24 bit.wav": dict(subtype="PCM_24"),
    "float.wav": dict(subtype="FLOAT"),
    "ADPCM.wav": dict(subtype="IMA_ADPCM"),
    "mp3 named.wav": dict(format="MP3", rate=44_100),
    "short mp3 named.wav": dict(format="MP3", seconds=0.15),
    "flac named.mp4": dict(format="FLAC"),
    "ogg": dict(format="OGG", subtype="VORBIS"),
    'it\'s "quoted"\n; rm -rf 狗.flac': dict(format="FLAC"),
    "shortest.wav": dict(seconds=0.1),
    "longest.wav": dict(seconds=30.0),
}


@pytest.mark.parametrize("deep", [False, True], ids=["headers", "deep"])
def test_what_is_fine_simply_works(folder, deep):
    for name, settings in FINE.items():
        write_tone(folder / "made", **{"format": "WAV", "seconds": 1.0} | settings)
        (folder / "made").rename(folder / name)
    (folder / "link.wav").symlink_to("plain.wav")
    content = bytearray((folder / "plain.wav").read_bytes())
    content[40:44] = b"\xff\xff\xff\xff"  # as a program writes it that does not know the length beforehand
    (folder / "streamed.wav").write_bytes(content)
    names = [*FINE, "link.wav", "streamed.wav"]
    path = write_rows(folder, *(GOOD | {"id": name, "audio_path": name} for name in names))
    examination = examine_training_file(path, Rules(deep=deep))
    assert not examination.dropped and not examination.notes, examination.table()
    assert load_train_dataset(path)["audio_path"][:] == [str(folder / name) for name in names]
    assert examination.longest == 30.0


def test_a_file_handle_is_not_left_open(folder):
    (folder / "text.wav").write_text("no audio")
    make_bad_clip("cut flac", folder / "cut.wav")
    gc.collect()  # what other tests left
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        for name in ("good.wav", "text.wav", "cut.wav"):
            examine_clip(Examined(Row(1, b""), audio_path=str(folder / name)), Rules(deep=True))
    assert len(os.listdir("/dev/fd")) == before


def test_what_is_kept_but_worth_knowing(folder):
    path = write_rows(folder, GOOD, GOOD | {"multi_choice": ["dog", "dog", "cat"], "id": 2}, GOOD)
    examination = examine_training_file(path, Rules(deep=True))
    assert not examination.dropped and examination.usable == 3
    assert examination.notes == {"choices with duplicates": 1}
    assert "choices with duplicates" in examination.table() and "line 2" in examination.table()


def test_training_gets_the_usable_rows_and_every_process_the_same(folder):
    rows = [GOOD | {"id": i, "answer": i % 3, "audio_path": "good.wav" if i % 4 else f"gone{i}.wav"} for i in range(30)]
    path = write_rows(folder, *rows)
    examination = examine_training_file(path, Rules("think"))
    loaded, again = (load_train_dataset(path, "think", skip=set(examination.dropped)) for _ in range(2))
    assert loaded["row"][:] == [i + 1 for i in range(30) if i % 4] and len(loaded) == examination.usable == 22
    assert loaded._fingerprint == again._fingerprint, "every process must cache under the same name"


def test_dropped_rows_are_written(folder):
    bad = [b'{"question_text": "caf\xe9"}', GOOD | {"audio_path": "gone.wav", "id": 7}]
    dropped_file = folder / "out" / "dropped.jsonl"
    examination = examine_training_file(write_rows(folder, GOOD, *bad), Rules(dropped_file=dropped_file))
    entries = [json.loads(line) for line in dropped_file.read_text().splitlines()]
    assert [entry["line"] for entry in entries] == list(examination.dropped) == [2, 3]
    assert entries[0] | {"text": ""} == {
        "line": 2, "reason": "not UTF-8", "text": "", "message": entries[0]["message"],
    }  # fmt: skip
    assert "gone.wav" in entries[1]["message"]
    assert json.loads(entries[1]["text"]) == bad[1] and "caf\\xe9" in entries[0]["text"]
    examine_training_file(write_rows(folder, GOOD), Rules(dropped_file=dropped_file))
    assert dropped_file.read_text() == "", "those of an earlier run are gone"
    assert list(dropped_file.parent.iterdir()) == [dropped_file]


def test_too_many_dropped_rows_stop_the_run(folder):
    examination = examine_training_file(write_rows(folder, *[GOOD] * 9, ""))
    examination.check_share(0.1)
    with pytest.raises(ValueError, match=r"(?s)--max_dropped 0.05.*blank line.*line 10"):
        examination.check_share(0.05)
    with pytest.raises(ValueError, match=r"(?s)blank line.*line 1"):
        examine_training_file(write_rows(folder, "")).check_share(1.0)


def test_no_file_and_no_rows(folder):
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        examine_training_file(folder / "gone.jsonl")
    with pytest.raises(ValueError, match="train.jsonl"):
        examine_training_file(write_rows(folder))
    with pytest.raises(ValueError, match="loud"):
        examine_training_file(write_rows(folder, GOOD), Rules("loud"))


def test_prompt_length_special_tokens_and_window_are_the_models(folder, small_model):
    processor = AutoProcessor.from_pretrained(small_model)
    write_tone(folder / "long.wav", 2.1)  # this model's window is 2 s
    token = processor.tokenizer.all_special_tokens[0]
    rows = [GOOD, GOOD | {"question_text": f"What is {token}?"}, GOOD | {"audio_path": "long.wav"}]
    rows += [GOOD | {"question_text": "What " * 200}]
    examination = examine_training_file(write_rows(folder, *rows), Rules(processor=processor, max_prompt_length=150))
    assert list(examination.dropped) == [2, 3, 4]
    assert set(examination.reasons) == {"special token in the question", "clip too long", "prompt too long"}
    assert token in examination.examples["special token in the question"]
    assert " 150 " in examination.examples["prompt too long"]
    tokens = examination.longest_prompt
    longer = examine_training_file(write_rows(folder, GOOD), Rules(processor=processor, max_prompt_length=tokens))
    assert not longer.dropped and longer.longest_prompt == tokens
    assert examine_training_file(
        write_rows(folder, GOOD), Rules(processor=processor, max_prompt_length=tokens - 1)
    ).dropped


# Evaluation files


def write_items(folder: Path, *items) -> Path:
    """A JSON list with an item a line, the first on line 2."""
    path = folder / "items.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, items)) + "\n]\n", encoding="utf-8")
    return path


BAD_ITEMS = [
    (5, "not a JSON object"),
    (without(ITEM, "question"), "`question` missing"),
    (ITEM | {"question": ""}, "`question` empty"),
    (ITEM | {"question": " "}, "question empty"),
    (ITEM | {"choices": "ab"}, "`choices` of the wrong type"),
    (ITEM | {"choices": []}, "`choices` empty"),
    (ITEM | {"choices": ["b"]}, "fewer than two choices"),
    (ITEM | {"choices": ["b", 5]}, "choice is no text"),
    (ITEM | {"answer": "c"}, "`answer` not among the choices"),
    (ITEM | {"answer": 1}, "`answer` not among the choices"),
    (ITEM | {"answer": ""}, "`answer` not among the choices"),
    (without(ITEM, "audio_id"), "`audio_id` missing"),
    (ITEM | {"audio_id": 5}, "`audio_id` of the wrong type"),
    (ITEM | {"audio_id": "gone.wav"}, "clip missing"),
    (ITEM | {"audio_id": "/etc/hostname"}, "clip outside the data folder"),
    (ITEM | {"id": "first"}, "id repeated"),
]


@pytest.mark.parametrize(("item", "reason"), BAD_ITEMS)
def test_a_bad_evaluation_row_is_named_with_its_number(folder, item, reason):
    path = write_items(folder, ITEM | {"id": "first"}, item, ITEM | {"id": "third"})
    examination = examine_evaluation_file(path)
    assert list(examination.dropped) == [2] and examination.reasons == {reason: 1}
    assert examination.examples[reason].startswith("row 2: ")


def test_good_evaluation_rows(folder):
    write_tone(folder / "long.wav", 31.0)
    items = [
        ITEM | {"id": "1", "choices": ["b", "b", "a"]},
        ITEM | {"id": "2", "answer": "", "split": "test"},
        ITEM | {"id": "3", "audio_id": str(folder / "clips" / "good.wav")},
        ITEM | {"id": "4", "audio_id": "long.wav"},
    ]
    examination = examine_evaluation_file(write_items(folder, *items))
    assert not examination.dropped
    assert examination.notes == {"choices with duplicates": 1, "clip over 30 s, will be cut": 1}
    mmar = without(ITEM, "audio_id") | {"audio_path": "./clips/good.wav", "modality": "sound"}
    path = folder / "mmar.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([mmar]).encode())
    assert examine_evaluation_file(path).usable == 1, "a byte-order mark does no harm"
    path.write_text(f"{json.dumps(mmar)}\n\n{json.dumps(mmar | {'id': 'y'})}\n")
    examination = examine_evaluation_file(path)
    assert list(examination.dropped) == [2] and examination.reasons == {"blank line": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": 1},\n{"id" 2}]', "not JSON .*line 2"),
        (b'[{"id": 1}\n{"id": 2}]', "not JSON .*line 2"),
        (b'[{"id": 1},\n]', "not JSON .*line 2"),
        (b'[{"id": 1}', "not JSON .*line 1"),
        (b"[]\n x", "not JSON .*line 2"),
        (b"[]", "items.json"),
        (b'[\n\n"caf\xe9"]', "not UTF-8 .*position 7"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_broken_evaluation_file_is_refused(tmp_path, content, message):
    path = tmp_path / "items.json"
    path.write_bytes(content)
    assert not is_training_file(path)
    with pytest.raises(ValueError, match=message):
        examine_evaluation_file(path)


def test_real_mmau(shared, tmp_path):
    """All 1000 real items, each with a clip: none is refused, duplicates are counted, rows are named by number."""
    source = shared / "data" / "mmau" / "mmau-test-mini.json"
    items = json.loads(source.read_text())
    (tmp_path / "test-mini-audios").mkdir()
    (tmp_path / source.name).write_bytes(source.read_bytes())
    write_tone(tmp_path / "clip.wav", 1.0)
    for item in items:
        os.link(tmp_path / "clip.wav", tmp_path / item["audio_id"])
    (tmp_path / items[5]["audio_id"]).unlink()
    examination = examine_evaluation_file(tmp_path / source.name)
    assert examination.rows == 1000 and list(examination.dropped) == [6]
    assert (
        examination.notes["choices with duplicates"]
        == sum(len(set(item["choices"])) < len(item["choices"]) for item in items)
        > 0
    )
    example = examination.examples["clip missing"]
    assert example.startswith("row 6: ") and items[5]["id"] in example


def test_kinds_of_files(folder, tmp_path):
    assert is_training_file(write_rows(folder, "", GOOD)) and not is_training_file(write_items(folder, ITEM))
    assert not is_training_file(write_rows(folder, json.dumps(ITEM)))
    path = tmp_path / "train_qa.json"
    path.write_text(json.dumps([without(GOOD, "audio_path")], indent=1))
    assert not is_training_file(path), "AVQA's annotations, before they are prepared"


# The command


def check(*arguments, **settings):
    return run("python", "src/run/check.py", *arguments, check=False, **settings)


@pytest.mark.slow
def test_the_command(folder, small_model, capsys):
    path = write_rows(folder, GOOD, GOOD | {"audio_path": "gone.wav"}, GOOD)
    process = check(path, "--model_path", small_model, "--deep")
    assert process.returncode == 1
    assert f"line 2: {folder / 'gone.wav'}: " in process.stdout
    assert "3 rows, 2 usable, 1 dropped" in process.stdout and "longest prompt" in process.stdout
    assert main([str(write_rows(folder, GOOD, GOOD)), "--model_path", "none"]) == 0
    assert "2 usable, 0 dropped" in capsys.readouterr().out


def test_what_the_command_refuses(folder, capsys):
    path = str(write_rows(folder, GOOD))
    for arguments, name in ((["gone.jsonl"], "gone.jsonl"), ([path, "--model_path", str(folder)], str(folder))):
        assert main(arguments) == 2
        assert name in capsys.readouterr().err
    for arguments in ([path, "--max_prompt_length", "0"], [path, "--dee"]):
        with pytest.raises(SystemExit):
            main(arguments)


def test_whole_numbers_have_a_bound():
    parse = at_least(1)
    assert parse("1") == 1 and at_least(-2)("-2") == -2
    for word in ("0", "-3", "1.5", "x", ""):
        with pytest.raises((ArgumentTypeError, ValueError)):  # argparse names the flag and the word for both
            parse(word)


# Size

MANY = """
import json, re, sys, time
from pathlib import Path
sys.path.insert(0, "src")
from run.check import Rules, examine_training_file
from dataset.dataset import load_train_dataset
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
with open(folder / "many.jsonl", "w") as file:
    for i in range(rows):
        row = dict(id=i, question_text=f"What happened in video {i}?", multi_choice=["a", "b", "c", "d"], answer=i % 5,
                   dataset_name="AVQA", audio_path="good.wav")
        file.write(json.dumps(row) + "\\n")
start = time.perf_counter()
examination = examine_training_file(folder / "many.jsonl", Rules(dropped_file=folder / "dropped.jsonl"))
dataset = load_train_dataset(folder / "many.jsonl", skip=set(examination.dropped))
assert examination.usable == len(dataset) == rows - rows // 5
assert dataset[len(dataset) - 1]["row"] == rows - 1
seconds = time.perf_counter() - start
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps([seconds, int(peak[1]) / 1024]))
"""


def examine_many(folder: Path, rows: int) -> tuple[float, float]:
    """s, and MiB at the peak of a process of its own."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak of memory from /proc")
    seconds, mebibytes = json.loads(run(sys.executable, "-c", MANY, folder, rows).stdout.splitlines()[-1])
    print(f"{rows} rows: {seconds:.1f} s, {mebibytes:.0f} MiB at the peak")
    return seconds, mebibytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(folder):
    small, large = examine_many(folder, 10_000)[1], examine_many(folder, 60_000)[1]
    assert large < small + 25, "in MiB; as Python objects the rows would take 100 more"


@pytest.mark.slow
def test_forty_thousand_rows_with_clips_in_place(tmp_path, shared):
    """Under a minute on 2 cores, tokens counted with the real tokenizer."""
    (tmp_path / "wavs").mkdir()
    write_tone(tmp_path / "clip.wav", 10.0)
    with open(tmp_path / "train.jsonl", "w") as file:
        for i in range(40_000):
            os.link(tmp_path / "clip.wav", tmp_path / "wavs" / f"{i}.wav")
            choices = [f"{thing} number {i}" for thing in ("motorboat", "yacht consignment", "sailboat", "car")]
            row = GOOD | {"id": i, "question_text": f"What happened in video {i}?", "multi_choice": choices}
            file.write(json.dumps(row | {"audio_path": f"wavs/{i}.wav"}) + "\n")
    start = time.perf_counter()
    process = check(tmp_path / "train.jsonl", "--model_path", shared / "models" / "qwen2-audio-7b-no-weights")
    seconds = time.perf_counter() - start
    print(f"40000 rows with clips: {seconds:.1f} s\n{process.stdout}")
    assert "40000 usable" in process.stdout and "longest prompt" in process.stdout
    assert seconds < 60


# data/README.md


def test_the_readmes_samples_are_valid(tmp_path):
    readme = (ROOT / "data" / "README.md").read_text()
    training, evaluation = [block.partition("```")[0] for block in readme.split("```json\n")[1:]]
    write_tone(tmp_path / "clip.wav", 1.0)
    for sample in (json.loads(training)["audio_path"], json.loads(evaluation)[0]["audio_id"]):
        (tmp_path / sample).parent.mkdir(exist_ok=True)
        os.link(tmp_path / "clip.wav", tmp_path / sample)
    (tmp_path / "train.data").write_text(training)
    (tmp_path / "items.json").write_text(evaluation)
    assert examine_training_file(tmp_path / "train.data").usable == 1
    assert examine_evaluation_file(tmp_path / "items.json").usable == 1


def test_the_readmes_commands_parse():
    import prepare_avqa
    import prepare_mmau

    parsers = {
        "data/prepare_avqa.py": prepare_avqa,
        "data/prepare_mmau.py": prepare_mmau,
        "src/run/check.py": check_module,
    }
    lines = (ROOT / "data" / "README.md").read_text().splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    assert {command[1] for command in commands} == set(parsers)
    for _, script, *arguments in commands:
        parsers[script].parse_args(arguments)


def test_without_a_cached_model_no_hub_is_asked(folder, tmp_path):
    """The default model counts tokens only if it is in the cache; a search for it on the hub would take minutes."""
    path = write_rows(folder, GOOD)
    variables = dict(HF_HOME=tmp_path / "empty", HF_ENDPOINT="http://127.0.0.1:9")  # nothing answers there
    started = time.monotonic()
    done = run(sys.executable, "src/run/check.py", path, **variables)
    assert "longest prompt" not in done.stdout and time.monotonic() - started < 60
