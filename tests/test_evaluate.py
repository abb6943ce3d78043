"""test_mmau.py and test_mmau.sh on real (small, untrained) checkpoints and real files: results, skips, refusals, resuming."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import test_mmau
from conftest import ROOT, SHARED, write_tone
from dataset.prompt import save_style
from dataset.questions import load_questions
from evaluation import processes
from evaluation.answers import EncodedQuestions, answer_batches
from evaluation.checkpoints import load_model
from evaluation.clips import swap_clips
from evaluation.collect import read_results
from evaluation.identity import fingerprint
from evaluation.mmau import evaluate
from evaluation.results import Settings
from model.qwen2_audio import load_processor
from running import environment
from tiny import build_demo_model, build_processor
from utils.show_acc import format_tables

SCRIPT = [sys.executable, "src/test_mmau.py"]
TOKENS = ["--max_new_tokens", "12"]
MINI = "mmau_mini_tokens-12"  # so the files of results are called then
# rate, channels, format: what MMAU's files are, all of them named .wav
KINDS = [(16_000, 1, "WAV"), (8_000, 1, "WAV"), (48_000, 2, "WAV"), (44_100, 6, "WAV"), (32_000, 2, "MP3")]
CHOICES = [["dog", "cat"], ["a bell", "a horn", "a dog and a cat", "rain"], ["1", "2", "3", "4", "5"]]


def make_rows(count: int) -> list[dict]:
    """MMAU's own questions where ../shared has them, else ones like them."""
    if SHARED.is_dir():
        rows = json.loads((SHARED / "data" / "mmau" / "mmau-test-mini.json").read_text())
        return rows[:: len(rows) // count][:count]
    tasks = ["sound", "music", "speech"]
    return [
        {
            "id": f"id-{i}",
            "audio_id": f"./test-mini-audios/id-{i}.wav",
            "question": f"Question {i}{'?' * (i % 9)}",
            "choices": CHOICES[i % 3],
            "answer": CHOICES[i % 3][i % 2],
            "task": tasks[i % 3],
            "split": "test-mini",
            "sub-category": "Counting",
            "difficulty": "easy",
        }
        for i in range(count)
    ]


def write_questions(folder: Path, rows: list[dict], name: str = "mmau-test-mini.json") -> Path:
    """The question file, and a clip for each row, 0.3 to 1.9 s long."""
    (folder / "test-mini-audios").mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        rate, channels, kind = KINDS[number % len(KINDS)]
        path = folder / row["audio_id"]
        write_tone(path, 0.3 + 1.6 * (number * 7 % 40) / 40, 100 + 50 * number, rate, channels, format=kind)
    (folder / name).write_text(json.dumps(rows))
    return folder / name


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("MMAU"), make_rows(40))


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("few"), make_rows(6))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of a run: checkpoint-100 and checkpoint-200, with different weights."""
    folder = tmp_path_factory.mktemp("exp") / "run"
    processor = build_processor([row["question"] for row in make_rows(40)])
    for step in (100, 200):
        build_demo_model(
            folder / f"checkpoint-{step}",
            processor,
            seed=step,
            initializer_range=0.2,
            hidden_size=32,
            audio_size=32,
            layers=2,
        )
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy of checkpoint-100 to spoil."""
    return Path(shutil.copytree(trained / "checkpoint-100", tmp_path / "exp" / "checkpoint-100"))


def sweep(*flags) -> int:
    return test_mmau.run(test_mmau.parse_args([str(flag) for flag in [*flags, *TOKENS]]))


def read(folder: Path, step="100", name=MINI) -> list[dict]:
    return json.loads((folder / f"test_{step}" / f"res_{name}.json").read_text())


@pytest.fixture(scope="module")
def swept(trained, questions, tmp_path_factory) -> Path:
    """The results of both checkpoints from one process."""
    out = tmp_path_factory.mktemp("out")
    flags = ["--model_path", *sorted(trained.glob("checkpoint-*")), "--data_file", questions, "--out_dir", out]
    assert test_mmau.run(test_mmau.parse_args([str(flag) for flag in [*flags, "--batch_size", 8, *TOKENS]])) == 0
    return out


def results(folder: Path) -> dict[str, bytes]:
    """The files in a folder, without the path from there to the clips."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: re.sub(rb'  "audio_dir": .*\n', b"", content) for name, content in files.items()}


def test_a_sweep_writes_all_that_was_in_the_file_with_predictions_and_scores(swept, questions):
    rows = json.loads(questions.read_text())
    for step in ("100", "200"):
        records = read(swept, step)
        assert [{key: record[key] for key in row} for row, record in zip(rows, records, strict=True)] == rows
        assert all(record["model_prediction"] == record["model_output"] for record in records)
        assert all(record["release"] == load_questions(questions).release for record in records)
        folder = swept / f"test_{step}"
        assert (folder / f"eval_{MINI}.txt").read_text() == str(evaluate(records))
        assert sorted(path.name for path in folder.iterdir()) == [
            f"eval_{MINI}.txt", f"res_{MINI}.json", f"run_{MINI}.json"
        ]  # fmt: skip
    answers = {step: [record["model_completion"] for record in read(swept, step)] for step in ("100", "200")}
    assert answers["100"] != answers["200"] and len(set(answers["100"])) > 5


def test_the_files_in_full(swept, trained, questions, few, checkpoint):
    """Other programs find their keys where they were, and a result says what it rests on."""
    benchmark, folder = load_questions(questions), swept / "test_100"
    records = read(swept)
    scores = evaluate(records)
    run = json.loads((folder / f"run_{MINI}.json").read_text())
    digests = {key: run[key] for key in ("records", "clips", "prompt_digest")}
    assert all(len(digest) >= 8 for digest in digests.values()) and len(set(digests.values())) == 3
    prompt = "QUESTION Please choose the answer from the following options: ['CHOICE', 'CHOICE']."
    assert run == digests | {
        "label": "100", "weights": fingerprint(trained / "checkpoint-100"), "benchmark": "mmau_mini",
        "release": benchmark.release, "questions": benchmark.digest, "dtype": "float32", "style": "answer",
        "audio": "real", "channels": "first", "max_new_tokens": 12, "sample_seed": None, "allow_missing": False,
        "prompt": f"{prompt} Output the final answer in <answer> </answer>.", "decoding": "greedy",
        "match": "MMAU string_match at 110127f", "missing": [], "cut": 0,
        "audio_dir": os.path.relpath(questions.parent, swept),
        "no_choice": scores.no_choice, "several": scores.several, "cut_off": scores.cut_off,
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                  for path in (folder / f"res_{MINI}.json", folder / f"eval_{MINI}.txt")},
    }  # fmt: skip
    assert scores.cut_off > 0  # untrained models go on and on
    rows = []
    for row, record in zip(json.loads(questions.read_text()), records, strict=True):
        answer, completion = record["model_prediction"], record["model_completion"]
        added = {"model_prediction": answer, "model_output": answer, "release": benchmark.release}
        rows.append(row | added | {"model_completion": completion, "model_cut_off": record["model_cut_off"]})
    assert (folder / f"res_{MINI}.json").read_text() == json.dumps(rows, indent=2) + "\n"
    sweep("--model_path", checkpoint, "--data_file", few, "--dtype", "bfloat16", "--batch_size", 3)
    run = json.loads((checkpoint.parent / "test_100" / f"run_{MINI}_bfloat16.json").read_text())
    assert run["batch_size"] == 3


@pytest.mark.parametrize("size", [1, 3, 40])
def test_the_files_are_the_same_for_any_batch_size_and_order_of_answering(swept, trained, questions, tmp_path, size):
    flags = ["--model_path", *sorted(trained.glob("checkpoint-*")), "--data_file", questions, "--out_dir", tmp_path]
    assert sweep(*flags, "--batch_size", size) == 0
    assert results(tmp_path) == results(swept)


def test_a_process_may_have_no_share(trained):
    folder = trained / "checkpoint-100"
    questions = EncodedQuestions([], {}, load_processor(folder), Settings())
    answer_batches(load_model(folder, torch.float32, torch.device("cpu")), questions, [], pytest.fail, "")


def test_an_error_of_one_process_is_raised_by_all(monkeypatch):
    """`main=True` broadcasts; here the other process is one that has raised."""
    assert processes.run_on_all(lambda: 5) == processes.run_on_all(lambda: 5, main=True) == 5
    monkeypatch.setattr(processes, "gather_object", lambda errors: [*errors, OSError("of another process")])
    with pytest.raises(OSError, match="of another process"):
        processes.run_on_all(lambda: 5)


@pytest.mark.slow
def test_two_processes_through_the_launcher_write_the_same_bytes(swept, trained, questions, tmp_path):
    """In another order of the questions too; and the table is printed."""
    out = tmp_path / "out"
    out.mkdir()
    for path in trained.iterdir():
        (out / path.name).symlink_to(path)
    variables = environment(GPU_NUM=2, OUT_DIR=out, MMAU_DIR=questions.parent, BATCH_SIZE=5)
    command = ["sh", str(ROOT / "test_mmau.sh"), *TOKENS, "--device", "cpu"]
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for step in ("100", "200"):
        assert results(out / f"test_{step}") == results(swept / f"test_{step}")
    header, first, second = run.stdout.splitlines()[-3:]
    assert header.split()[:1] == ["step"] and "95% interval" in header
    assert {first.split()[0], second.split()[0]} == {"100", "200"}


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_in_the_same_file(swept, trained, questions, tmp_path):
    command = [
        *SCRIPT,
        "--model_path",
        trained / "checkpoint-100",
        "--data_file",
        questions,
        "--out_dir",
        tmp_path,
        *TOKENS,
    ]
    process = subprocess.Popen(
        [*command, "--batch_size", "2"], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE
    )
    partial = tmp_path / "test_100" / f"res_{MINI}.json.partial-0"
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_text().count("\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = partial.read_text().count("\n") - 1
    assert 0 < done < 40 and not (tmp_path / "test_100" / f"res_{MINI}.json").exists()
    run = json.loads((swept / "test_100" / f"run_{MINI}.json").read_text())
    assert partial.read_text().split("\n")[0] == json.dumps({key: run[key] for key in list(run)[:-7]})
    with open(partial, "a") as file:  # a line that the kill cut off
        file.write('["half a li')
    assert sweep(*command[len(SCRIPT) : -len(TOKENS)], "--batch_size", 7) == 0
    assert results(tmp_path / "test_100") == results(swept / "test_100")


def test_what_is_finished_is_skipped_and_other_settings_are_not(few, checkpoint):
    flags = ["--model_path", checkpoint, "--data_file", few]
    assert sweep(*flags) == 0
    file = checkpoint.parent / "test_100" / f"res_{MINI}.json"
    before = file.stat().st_mtime_ns
    assert sweep(*flags, "--batch_size", 3) == 0
    assert file.stat().st_mtime_ns == before
    sweep(*flags, "--force")
    assert file.stat().st_mtime_ns > before
    before = file.stat().st_mtime_ns
    sweep(*flags, "--prompt_style", "choice")  # beside it
    assert file.stat().st_mtime_ns == before
    assert (file.parent / "res_mmau_mini_choice_tokens-12.json").is_file()


def replace_clip(path: Path, rows: list[dict], folder: Path) -> None:
    write_tone(path.parent / rows[2]["audio_id"], seconds=1.0, frequency=1234)


def rotate_clips(path: Path, rows: list[dict], folder: Path) -> None:
    clips = [row["audio_id"] for row in rows]
    for row, clip in zip(rows, clips[1:] + clips[:1], strict=True):
        row["audio_id"] = clip


def relabel(path: Path, rows: list[dict], folder: Path) -> None:
    for row in rows:
        row["task"] = "music"


def change_choices(path: Path, rows: list[dict], folder: Path) -> None:
    rows[0]["choices"] = [*rows[0]["choices"], "an alarm"]


def change_answer(path: Path, rows: list[dict], folder: Path) -> None:
    rows[0]["answer"] = next(choice for choice in rows[0]["choices"] if choice != rows[0]["answer"])


def reorder(path: Path, rows: list[dict], folder: Path) -> None:
    rows.reverse()


def cut_results_off(path: Path, rows: list[dict], folder: Path) -> None:
    file = folder / f"res_{MINI}.json"
    file.write_bytes(file.read_bytes()[:-20])


def change_results(path: Path, rows: list[dict], folder: Path) -> None:
    file = folder / f"res_{MINI}.json"
    file.write_text(file.read_text().replace('"model_output": "', '"model_output": "dog ', 1))


def delete_scores(path: Path, rows: list[dict], folder: Path) -> None:
    (folder / f"eval_{MINI}.txt").unlink()


def damage_run_file(path: Path, rows: list[dict], folder: Path) -> None:
    (folder / f"run_{MINI}.json").write_text("{")


STALE = {
    replace_clip: "clips", rotate_clips: "clips, records", relabel: "records", change_choices: "questions, records",
    change_answer: "questions, records", reorder: "clips, records", cut_results_off: f"res_{MINI}.json",
    change_results: f"res_{MINI}.json", delete_scores: f"eval_{MINI}.txt", damage_run_file: f"run_{MINI}.json",
}  # fmt: skip


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_what_is_stale_is_evaluated_again(tmp_path, checkpoint, capsys, change):
    """And ends in the same files as if nothing had been there."""
    rows = make_rows(6)
    path = write_questions(tmp_path, rows)
    flags = ["--model_path", checkpoint, "--data_file", path]
    sweep(*flags)
    folder = checkpoint.parent / "test_100"
    change(path, rows, folder)
    path.write_text(json.dumps(rows))
    capsys.readouterr()
    assert sweep(*flags) == 0
    assert STALE[change] in capsys.readouterr().err
    sweep(*flags, "--out_dir", tmp_path / "fresh")
    assert results(folder) == results(tmp_path / "fresh" / "test_100")
    written = (folder / f"res_{MINI}.json").stat().st_mtime_ns
    assert sweep(*flags) == 0 and (folder / f"res_{MINI}.json").stat().st_mtime_ns == written


def test_a_clip_that_was_put_back_is_asked_about(tmp_path, checkpoint):
    rows = make_rows(6)
    path = write_questions(tmp_path, rows)
    clip = (tmp_path / rows[1]["audio_id"]).rename(tmp_path / "away")
    flags = ["--model_path", checkpoint, "--data_file", path, "--allow_missing"]
    sweep(*flags)
    name = f"{MINI}_allow_missing"
    run = checkpoint.parent / "test_100" / f"run_{name}.json"
    assert json.loads(run.read_text())["missing"] == [rows[1]["id"]]
    clip.rename(tmp_path / rows[1]["audio_id"])
    sweep(*flags)
    assert json.loads(run.read_text())["missing"] == [] and read(checkpoint.parent, name=name)[1]["model_prediction"]


def test_a_clip_that_is_replaced_during_the_run_ends_it(tmp_path, checkpoint, monkeypatch):
    """Answers could be about either; the next run is about the new one."""
    rows = make_rows(4)
    path = write_questions(tmp_path, rows)

    def answer_and_replace(*arguments):
        answer_batches(*arguments)
        replace_clip(path, rows, tmp_path)

    monkeypatch.setattr("evaluation.sweep.answer_batches", answer_and_replace)
    flags = ["--model_path", checkpoint, "--data_file", path]
    with pytest.raises(ValueError, match=f"{rows[2]['id']}.wav"):
        sweep(*flags)
    monkeypatch.undo()
    assert sweep(*flags) == 0 and sweep(*flags, "--out_dir", tmp_path / "fresh") == 0
    assert results(checkpoint.parent / "test_100") == results(tmp_path / "fresh" / "test_100")


def test_a_finished_sweep_decodes_nothing_and_loads_nothing(few, checkpoint, monkeypatch):
    flags = ["--model_path", checkpoint, "--data_file", few]
    assert sweep(*flags) == 0
    for heavy in ("clips.load_audio", "answers.load_audio", "sweep.load_model", "sweep.load_processor"):
        monkeypatch.setattr(f"evaluation.{heavy}", lambda *_: pytest.fail("not needed"))
    assert sweep(*flags) == 0


@pytest.mark.parametrize("absolute", [True, False])
def test_a_clip_outside_the_audio_folder_is_refused(tmp_path, checkpoint, absolute):
    rows = make_rows(2)
    path = write_questions(tmp_path / "MMAU", rows)
    (tmp_path / "MMAU" / rows[1]["audio_id"]).rename(tmp_path / "private.wav")
    rows[1]["audio_id"] = str(tmp_path / "private.wav") if absolute else "../private.wav"
    path.write_text(json.dumps(rows))
    flags = ["--model_path", checkpoint, "--data_file", path]
    with pytest.raises(ValueError, match="private.wav.*--allow_outside"):
        sweep(*flags)
    assert sweep(*flags, "--allow_outside") == 0


def test_a_pipe_in_the_place_of_a_clip_does_not_hang(tmp_path, checkpoint):
    rows = make_rows(2)
    path = write_questions(tmp_path, rows)
    (tmp_path / rows[1]["audio_id"]).unlink()
    os.mkfifo(tmp_path / rows[1]["audio_id"])
    signal.alarm(60)  # ends the tests if it does
    try:
        with pytest.raises(ValueError, match="1 of 2"):
            sweep("--model_path", checkpoint, "--data_file", path)
    finally:
        signal.alarm(0)


def test_a_question_over_the_models_context_is_refused(tmp_path, checkpoint):
    """The tokenizer says how much it is."""
    rows = make_rows(3)
    rows[1]["question"] += " What?" * 3000
    path = write_questions(tmp_path, rows)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 2000}))
    with pytest.raises(ValueError, match=f"(?s)1 of 3.*{rows[1]['id']}.*2000"):
        sweep("--model_path", checkpoint, "--data_file", path)


def test_a_linked_checkpoint_keeps_its_step(few, trained, tmp_path):
    (tmp_path / "checkpoint-7").symlink_to(trained / "checkpoint-100")
    assert sweep("--model_path", tmp_path / "checkpoint-7", "--data_file", few) == 0
    assert [result.step for result in read_results(tmp_path)[0]] == [7]


def test_without_any_clip_there_is_nothing_to_evaluate(tmp_path, checkpoint):
    rows = make_rows(2)
    path = write_questions(tmp_path, rows)
    for row in rows:
        (tmp_path / row["audio_id"]).unlink()
    with pytest.raises(ValueError, match="2 of 2"):
        sweep("--model_path", checkpoint, "--data_file", path, "--allow_missing")


@pytest.mark.parametrize("content", ["of another run", "damaged", "of this run"])
def test_force_repeats_whatever_partial_files_lie_about(few, checkpoint, capsys, content):
    """And without it, a damaged one is named and its answers are asked for again."""
    flags = ["--model_path", checkpoint, "--data_file", few]
    sweep(*flags)
    folder = checkpoint.parent / "test_100"
    before = results(folder)
    run = json.loads((folder / f"run_{MINI}.json").read_text())
    described = dict(list(run.items())[:-6])  # without what is known at the end
    head = {"of another run": "{}", "damaged": json.dumps(described)}.get(content, json.dumps(described))
    answers = [[record["id"], "made up", False] for record in read(checkpoint.parent)]
    lines = [head, "not JSON" if content == "damaged" else "", *map(json.dumps, answers), ""]
    (folder / f"res_{MINI}.json.partial-0").write_text("\n".join(filter(None, lines)) + "\n")
    if content == "damaged":
        (folder / f"run_{MINI}.json").unlink()
        assert sweep(*flags) == 0 and f"res_{MINI}.json.partial-0" in capsys.readouterr().err
    else:
        assert sweep(*flags, "--force") == 0
    assert results(folder) == before


def test_two_runs_do_not_write_one_result(few, checkpoint, capsys):
    """A lock file that a killed run has left is no obstacle."""
    flags = ["--model_path", checkpoint, "--data_file", few]
    lock = checkpoint.parent / "test_100" / f"res_{MINI}.json.lock"
    lock.parent.mkdir()
    with FileLock(lock):
        assert sweep(*flags) == 1
        assert str(lock.parent) in capsys.readouterr().err and list(lock.parent.iterdir()) == [lock]
    assert lock.is_file() and sweep(*flags) == 0 and not lock.exists()


def test_other_settings_live_side_by_side(few, checkpoint):
    flags = ["--model_path", checkpoint, "--data_file", few]
    variants = {
        "": [], "_bfloat16": ["--dtype", "bfloat16"], "_channels-mean": ["--audio_channels", "mean"],
        "_choice": ["--prompt_style", "choice"], "_sample-42": ["--sample"], "_sample-7": ["--sample", "--seed", "7"],
        "_allow_missing": ["--allow_missing"], "_silent": ["--hear", "silent"],
    }  # fmt: skip
    for other in variants.values():
        assert sweep(*flags, *other) == 0
    found, skipped = read_results(checkpoint.parent)
    assert not skipped
    # The two seeds are one row.
    assert len(found) == len(variants) - 1 and sorted(len(result.runs) for result in found) == [1] * 6 + [2]
    assert len(list((checkpoint.parent / "test_100").glob("res_*"))) == len(variants)
    (table,) = format_tables(found).split("\n\n")
    assert table.splitlines()[1] == "tokens 12, match MMAU string_match at 110127f"
    assert table.splitlines()[2].split()[:5] == ["step", "audio", "prompt", "decoding", "dtype"]


def test_other_weights_under_the_same_name_are_evaluated_again(few, trained, checkpoint, capsys):
    flags = ["--model_path", checkpoint, "--data_file", few]
    sweep(*flags)
    before = read(checkpoint.parent)
    shutil.copy(trained / "checkpoint-200" / "model.safetensors", checkpoint)
    sweep(*flags)
    assert "weights" in capsys.readouterr().err
    assert read(checkpoint.parent) != before


def test_the_recorded_style_is_used_and_overriding_it_warns(few, checkpoint, capsys):
    save_style(checkpoint, "think")
    flags = ["--model_path", checkpoint, "--data_file", few]
    sweep(*flags)
    folder = checkpoint.parent / "test_100"
    assert json.loads((folder / f"run_{MINI}.json").read_text())["style"] == "think"
    assert "warning" not in capsys.readouterr().err
    sweep(*flags, "--prompt_style", "answer")
    assert "'think'" in capsys.readouterr().err
    assert json.loads((folder / "run_mmau_mini_answer_tokens-12.json").read_text())["style"] == "answer"


@pytest.mark.parametrize("damage", ["cut off", "no weights", "no processor", "config cut off", "no base"])
def test_an_incomplete_checkpoint_is_named_and_skipped(few, trained, checkpoint, capsys, damage):
    weights = checkpoint / "model.safetensors"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no processor":
        (checkpoint / "tokenizer.json").unlink()
    elif damage == "no base":
        weights.rename(checkpoint / "adapter_model.safetensors")
        (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base"}')
    else:
        (checkpoint / "config.json").write_text('{"model_type": ')
    out = checkpoint.parent / "out"
    models = [checkpoint, trained / "checkpoint-200", checkpoint.parent / "checkpoint-300"]
    assert sweep("--model_path", *models, "--data_file", few, "--out_dir", out) == 3
    said = capsys.readouterr().err
    assert str(checkpoint) in said and "checkpoint-300" in said and "checkpoint-200" not in said
    assert sorted(path.name for path in out.iterdir()) == ["test_200"]


def remove_tensor(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_not_replaced_by_random_ones(few, checkpoint, capsys):
    remove_tensor(checkpoint)
    assert sweep("--model_path", checkpoint, "--data_file", few) == 1
    assert str(checkpoint) in capsys.readouterr().err


def poison(checkpoint: Path, value: float = float("nan")) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[sorted(tensors)[7]].view(-1)[3] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "NaN": poison,
    "infinite": lambda folder: poison(folder, float("inf")),
    "tokenizer.json": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "processor_config.json": lambda folder: (folder / "processor_config.json").write_text("[]"),
    "config.json": lambda folder: (folder / "config.json").write_text("{}"),
    "bert": lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
    "test_100": lambda folder: (folder.parent / "out" / "test_100").write_text("a file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_bad_model_does_not_end_the_sweep(few, trained, checkpoint, capsys, damage):
    out = checkpoint.parent / "out"
    out.mkdir()
    DAMAGES[damage](checkpoint)
    flags = ["--model_path", checkpoint, trained / "checkpoint-200", "--data_file", few, "--out_dir", out]
    assert sweep(*flags) == 3
    said = capsys.readouterr().err
    assert str(out / "test_100" if damage == "test_100" else checkpoint) in said
    assert len(read(out, "200")) == 6


@pytest.mark.slow
def test_a_process_without_questions_skips_a_broken_model_with_the_others(few, trained, checkpoint, tmp_path):
    """Two processes, one batch: the one without it must not wait for the other, which has gone on to the next model."""
    remove_tensor(checkpoint)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT[1]]
    command += ["--model_path", checkpoint, trained / "checkpoint-200", "--data_file", few, "--out_dir", tmp_path]
    command += [*TOKENS, "--device", "cpu", "--batch_size", "32"]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180)
    assert run.returncode != 0, run.stderr
    assert run.stderr.count("100: skipped") == 1 and len(read(tmp_path, "200")) == 6


def test_missing_and_unreadable_clips_stop_the_run_before_the_first_batch(tmp_path, checkpoint, capsys):
    rows = make_rows(6)
    path = write_questions(tmp_path, rows)
    (tmp_path / rows[1]["audio_id"]).unlink()
    (tmp_path / rows[2]["audio_id"]).write_bytes(b"no audio at all")
    soundfile.write(tmp_path / rows[3]["audio_id"], [0.0] * 100, 16_000, format="WAV")  # 6 ms
    flags = ["--model_path", checkpoint, "--data_file", path]
    with pytest.raises(ValueError, match="3 of 6") as error:
        sweep(*flags)
    assert all(row["id"] in str(error.value) for row in rows[1:4]) and rows[0]["id"] not in str(error.value)
    assert not (checkpoint.parent / "test_100").exists()
    capsys.readouterr()
    assert sweep(*flags, "--allow_missing") == 0
    assert rows[1]["id"] in capsys.readouterr().err
    records = read(checkpoint.parent, name=f"{MINI}_allow_missing")
    assert [record["model_prediction"] == "" for record in records][1:4] == [True] * 3
    assert evaluate(records).questions == 6


def test_silent_and_shuffled_audio(few, checkpoint):
    flags = ["--model_path", checkpoint, "--data_file", few]
    sweep(*flags)
    sweep(*flags, "--hear", "silent")
    sweep(*flags, "--hear", "shuffled", "--batch_size", 4)
    heard = [[record["model_completion"] for record in read(checkpoint.parent, name=f"mmau_mini{kind}_tokens-12")]
             for kind in ("", "_silent", "_shuffled")]  # fmt: skip
    assert heard[0] != heard[1] and heard[0] != heard[2] and heard[1] != heard[2]
    out = checkpoint.parent / "again"
    sweep(*flags, "--hear", "shuffled", "--batch_size", 1, "--out_dir", out)
    assert read(out, name="mmau_mini_shuffled_tokens-12") == read(
        checkpoint.parent, name="mmau_mini_shuffled_tokens-12"
    )


def test_a_long_clip_is_cut_as_the_original_did_and_counted(tmp_path, checkpoint):
    rows = make_rows(3)
    path = write_questions(tmp_path, rows)
    write_tone(tmp_path / rows[0]["audio_id"], seconds=2.5)
    sweep("--model_path", checkpoint, "--data_file", path)
    assert json.loads((checkpoint.parent / "test_100" / f"run_{MINI}.json").read_text())["cut"] == 1
    before = read(checkpoint.parent)
    audio, rate = soundfile.read(tmp_path / rows[0]["audio_id"])
    soundfile.write(tmp_path / rows[0]["audio_id"], audio[: 2 * rate], rate, format="WAV")
    sweep("--model_path", checkpoint, "--data_file", path, "--force")
    assert read(checkpoint.parent) == before


def test_sampling_is_seeded(few, checkpoint):
    flags = ["--model_path", checkpoint, "--data_file", few, "--sample"]
    sweep(*flags, "--seed", 1)
    first = read(checkpoint.parent, name="mmau_mini_sample-1_tokens-12")
    sweep(*flags, "--seed", 1, "--force", "--batch_size", 2)
    assert read(checkpoint.parent, name="mmau_mini_sample-1_tokens-12") == first
    sweep(*flags, "--seed", 2)
    assert read(checkpoint.parent, name="mmau_mini_sample-2_tokens-12") != first


def test_the_full_test_set_has_no_score_but_a_file_to_submit(tmp_path, checkpoint, capsys):
    rows = [row | {"answer": "", "split": "test"} for row in make_rows(3)]
    path = write_questions(tmp_path, rows, "mmau-test.json")
    assert sweep("--model_path", checkpoint, "--data_file", path) == 0
    assert "res_mmau_tokens-12.json" in capsys.readouterr().err
    assert all("model_prediction" in record for record in read(checkpoint.parent, name="mmau_tokens-12"))
    assert not list((checkpoint.parent / "test_100").glob("eval_*"))


def test_mmar_is_read_written_and_scored_by_modality(tmp_path, checkpoint):
    rows = make_rows(4)
    write_questions(tmp_path, rows)
    lines = [
        {"id": row["id"], "audio_path": row["audio_id"], "question": row["question"], "choices": row["choices"],
         "answer": row["answer"], "modality": ["sound", "mix-sound-music"][i % 2], "category": "Signal Layer",
         "sub-category": "Counting", "language": "en"}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    path = tmp_path / "MMAR-meta.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sweep("--model_path", checkpoint, "--data_file", path)
    folder = checkpoint.parent / "test_100"
    written = [json.loads(line) for line in (folder / "res_mmar_tokens-12.jsonl").read_text().splitlines()]
    assert [{key: record[key] for key in line} for line, record in zip(lines, written, strict=True)] == lines
    assert all("answer_prediction" in record for record in written)
    assert "mix-sound-music : " in (folder / "eval_mmar_tokens-12.txt").read_text()


def test_labels_and_output_files(few, trained, tmp_path, monkeypatch):
    models = [f"warm start={trained / 'checkpoint-200'}", trained / "checkpoint-100"]
    assert sweep("--model_path", *models, "--data_file", few, "--out_dir", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test_100", "test_warm start"]
    sweep("--model_path", trained / "checkpoint-100", "--data_file", few, "--out_file", tmp_path / "x" / "my.json")
    assert (tmp_path / "x" / "my.json").read_bytes() == (tmp_path / "test_100" / f"res_{MINI}.json").read_bytes()
    assert (tmp_path / "x" / "eval_my.txt").exists()
    with monkeypatch.context() as here:  # a name without a folder
        here.chdir(tmp_path)
        assert sweep("--model_path", models[1], "--data_file", few, "--out_file", "my.json") == 0
    assert (tmp_path / "my.json").read_bytes() == (tmp_path / "x" / "my.json").read_bytes()
    for path in tmp_path.glob("*my.*"):
        path.unlink()
    with pytest.raises(ValueError, match="--out_dir"):
        sweep("--model_path", f"{trained}/../run/checkpoint-100", models[1], "--data_file", few, "--out_dir", tmp_path)
    flags = ["--model_path", models[1], models[1], "--data_file", few, "--out_dir", tmp_path]  # STEPS="200 200"
    assert sweep(*flags) == 0


def test_several_files_are_asked_one_after_the_other(tmp_path, checkpoint):
    path = write_questions(tmp_path, make_rows(2))
    other = tmp_path / "shifted.json"
    other.write_text(json.dumps([row | {"split": "shifted"} for row in make_rows(1)]))
    flags = ["--model_path", checkpoint, "--data_file", path, other]
    assert sweep(*flags) == 0
    results, _ = read_results(checkpoint.parent)
    assert {r.benchmark.name: r.scores.questions for r in results} == {"mmau_mini": 2, "mmau_shifted": 1}
    with pytest.raises(ValueError, match="--data_file"):
        sweep(*flags, "--out_file", tmp_path / "x.json")
    with pytest.raises(ValueError, match="--data_file"):
        sweep(*flags, path)


def test_bad_question_files_are_named_by_row(tmp_path, checkpoint):
    rows = make_rows(2)
    for change, message in (({"choices": []}, "row 2: `choices`"), ({"id": rows[0]["id"]}, "row 2: the id")):
        path = tmp_path / "bad.json"
        path.write_text(json.dumps([rows[0], rows[1] | change]))
        with pytest.raises(ValueError, match=message):
            sweep("--model_path", checkpoint, "--data_file", path)
    with pytest.raises(FileNotFoundError, match="data/README.md"):
        sweep("--model_path", checkpoint, "--data_file", tmp_path / "none.json")


def test_an_answer_that_is_no_choice_is_reported_before_the_run(tmp_path, checkpoint, capsys):
    rows = make_rows(3)
    rows[1]["answer"] = "a zebra"
    path = write_questions(tmp_path, rows)
    assert sweep("--model_path", checkpoint, "--data_file", path) == 0
    said = capsys.readouterr().err
    assert "1 of 3 rows" in said and f"row 2 ({rows[1]['id']})" in said and "'a zebra'" in said
    assert evaluate(read(checkpoint.parent)).questions == 3


def test_what_cannot_be_written_is_named(few, checkpoint, tmp_path, capsys):
    """A folder in place of a file; on a full disk, the file that does not fit."""
    flags = ["--model_path", checkpoint, "--data_file", few]
    (tmp_path / "eval_x.txt").mkdir()
    assert sweep(*flags, "--out_file", tmp_path / "x.json") == 1
    assert "eval_x.txt" in capsys.readouterr().err
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        assert sweep(*flags, "--out_file", tmp_path / "y.json") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert f"{tmp_path}/y.json" in said and "[Errno 27]" in said
    assert sweep(*flags, "--out_file", tmp_path / "y.json") == 0


def test_a_mistake_is_reported_in_one_line(trained, tmp_path, monkeypatch, capsys):
    command = ["test_mmau.py", "--model_path", trained / "checkpoint-100", "--data_file", tmp_path / "gone.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert test_mmau.main() == 1
    (line,) = "".join(capsys.readouterr()).splitlines()
    assert line.startswith("test_mmau: ") and str(tmp_path / "gone.json") in line


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["imports", "answers"])
def test_ctrl_c_exits_with_one_line(trained, questions, tmp_path, moment):
    command = [*SCRIPT, "--model_path", trained / "checkpoint-100", "--data_file", questions, "--out_dir", tmp_path]
    process = subprocess.Popen(
        [*command, "--batch_size", "1"], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    caught = Path(f"/proc/{process.pid}/status")
    partial = tmp_path / "test_100" / f"res_{MINI.partition('_tokens')[0]}.json.partial-0"

    def is_time() -> bool:
        if moment == "answers":
            return partial.exists() and partial.read_text().count("\n") > 3
        (mask,) = (line for line in caught.read_text().splitlines() if line.startswith("SigCgt"))
        return (
            int(mask.split()[1], 16) >> (signal.SIGINT - 1) & 1
            and "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
        )

    while not is_time():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1].decode().splitlines()
    assert process.returncode == 130
    assert not any("Traceback" in line for line in said) and sum("interrupted" in line for line in said) == 1


def test_a_special_token_in_a_question_is_refused(tmp_path, checkpoint):
    rows = make_rows(2)
    rows[1]["question"] = "What is <|AUDIO|>?"
    path = write_questions(tmp_path, rows)
    with pytest.raises(ValueError, match="special token"):
        sweep("--model_path", checkpoint, "--data_file", path)


@pytest.mark.slow
def test_the_benchmark_runs():
    command = [sys.executable, "benchmarks/eval_speed.py", "--questions", "4", "--max_new_tokens", "2"]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "times as fast; 4 of 4 answers equal" in run.stdout


def test_the_launcher_without_checkpoints_says_what_to_do(tmp_path):
    variables = environment(OUT_DIR=tmp_path, GPU_NUM=1)
    run = subprocess.run(["sh", "test_mmau.sh"], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert run.returncode == 1 and "sh run_grpo.sh makes them" in run.stderr


@pytest.mark.slow
def test_shuffled_clips_are_paired_the_same_way_by_every_interpreter():
    """Also those of the same name in two folders."""
    paths = [f"{folder}/{i}.wav" for folder in "abc" for i in range(9)]
    code = f"from evaluation.clips import swap_clips\nprint(sorted(swap_clips({paths}).items()))"
    own = environment(PYTHONPATH=ROOT / "src", PYTHONHASHSEED="1")  # ours is drawn anew
    said = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert said.stdout == f"{sorted(swap_clips(paths).items())}\n" and said.stdout.count("wav") == 54, said.stderr


@pytest.mark.slow
def test_the_launcher_prints_the_table_of_those_that_could_be_evaluated(few, trained, tmp_path):
    """From another folder, a relative OUT_DIR that looks like a flag, a step given twice, and one that is not whole."""
    out = tmp_path / "-rel"
    for step in (100, 200):
        shutil.copytree(trained / f"checkpoint-{step}", out / f"checkpoint-{step}")
    (out / "checkpoint-100" / "config.json").unlink()
    env = environment(GPU_NUM=1, OUT_DIR="-rel", MMAU_DIR=few.parent, STEPS="200 200 100")
    command = ["sh", str(ROOT / "test_mmau.sh"), *TOKENS, "--device", "cpu"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    assert "100: skipped" in run.stderr
    assert run.stdout.splitlines()[-1].split()[0] == "200" and (out / "test_200").is_dir()
