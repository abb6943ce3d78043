"""run/startup.py: what ends a run before its model is loaded, and what a run without a step writes."""

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from conftest import ROOT
from run.checkpoints import checkpoints_in
from run.startup import LOCK, hold
from running import environment, free_port


@pytest.fixture
def start(script, small_model, questions, tmp_path, monkeypatch):
    """Starts train.py with further flags; it fails the test if it loads the model without leave."""

    def start(*flags: object, data: Path = questions, loads: bool = False) -> tuple[int, str]:
        if not loads:
            monkeypatch.setattr("trainer.grpo_trainer.AudioGRPOTrainer.__init__", loaded)
        return script(
            "train.py", "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2", "--save_steps", "1",
            "--max_completion_length", "4", "--max_steps", "2", "--report_to", "none", "--disable_tqdm", "true",
            "--model_name_or_path", small_model, "--data_file", data, "--output_dir", tmp_path / "out", *flags,
        )  # fmt: skip

    return start


class Loaded(Exception):
    pass


def loaded(*args, **kwargs):
    raise Loaded


def test_a_second_run_in_a_folder_is_refused(start, tmp_path):
    with ExitStack() as held:
        hold(tmp_path / "out", held)
        status, said = start()
        assert status == 2 and str(tmp_path / "out") in said and said.count("\n") == 1
    (tmp_path / "out" / LOCK).touch()  # a run that was killed leaves the file
    with pytest.raises(Loaded):
        start()


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_an_output_folder_that_cannot_be_written_is_refused(start, tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    status, said = start("--output_dir", tmp_path / place)
    assert status == 2 and place in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--questions_per_step", "9"], 9),
        (["--questions_per_step", "12", "--per_device_train_batch_size", "12"], 12),
        (["--questions_per_step", "8"], None),
    ],
)
def test_fewer_questions_than_a_step_takes_are_refused(start, flags, needed):
    if needed is None:
        with pytest.raises(Loaded):
            start(*flags)
    else:
        status, said = start(*flags)
        assert status == 2 and f"8 usable questions are fewer than the {needed} " in said
        assert "--questions_per_step" in said


@pytest.mark.parametrize("flag", ["--data_file", "--eval_file", "--model_name_or_path", "--resume_from_checkpoint"])
def test_a_path_that_does_not_exist_is_named(start, tmp_path, flag):
    status, said = start(flag, tmp_path / "gone")
    assert status == 2 and str(tmp_path / "gone") in said and said.count("\n") == 1


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
def test_a_damaged_model_is_refused(start, small_model, tmp_path, file):
    """The kinds of damage are those of `test_checkpoints.py` and `test_evaluate.py`."""
    model = shutil.copytree(small_model, tmp_path / "model")
    if file == "model.safetensors":
        tensors = load_file(model / file)
        del tensors[min(tensors)]
        save_file(tensors, model / file, metadata={"format": "pt"})
    else:
        (model / file).unlink()
    status, said = start("--model_name_or_path", model)
    assert status == 2 and str(model) in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("eval_strategy", "steps"), ("fsdp", "full_shard"), ("cast_lm_head_to_fp32", "true"),
        ("label_smoothing_factor", "0.1"), ("lr_scheduler_type", "cosine_with_min_lr"), ("output_dir", "not-\udcff-UTF-8"),
    ],
)  # fmt: skip
def test_a_flag_that_cannot_work_is_named_before_the_model_is_loaded(start, flag, value):
    status, said = start(f"--{flag}", value)
    named = {"output_dir": "OUT_DIR"}.get(flag, f"--{flag}")
    assert status == 2 and named in said and said.count("\n") == 1


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are(start, questions):
    flags = ["--eval_file", questions, "--load_best_model_at_end", "true", "--metric_for_best_model"]
    status, said = start(*flags, "accuracy_Sound")
    assert status == 2 and "accuracy_Sound" in said and "accuracy_all" in said
    with pytest.raises(Loaded):
        start(*flags, "eval_accuracy_all")


@pytest.mark.parametrize(
    ("flag", "value"), [("generation_kwargs", '{"temperature": 0}'), ("learning_rate", "1e30")], ids=lambda part: part
)
def test_what_cannot_be_sampled_ends_a_run_in_one_line(start, tmp_path, flag, value):
    (tmp_path / "mine.py").write_text("def some(completions, **_):\n    return [len(set(c)) for c in completions]\n")
    status, said = start("--reward_funcs", f"{tmp_path}/mine.py:some", f"--{flag}", value, loads=True)
    assert status == 2 and flag.removeprefix("generation_kwargs") in said and said.count("\n") == 1


def test_a_reward_that_cannot_be_used_is_named(start, tmp_path):
    (tmp_path / "mine.py").write_text("def few(completions, **_):\n    return [1.0]\n")
    status, said = start("--reward_funcs", "accuracy", f"{tmp_path}/mine.py:few")
    assert status == 2 and "few" in said


def test_the_evaluation_file_is_examined_as_the_training_file(start, questions, tmp_path, monkeypatch):
    """A missing clip drops its row, or ends the run where more than --max_dropped are missing; an answer that is not
    among the choices is asked, as in an evaluation."""
    item = {
        "question": "What is in the audio?", "choices": ["dog", "cat"], "answer": "dog", "task": "sound",
        "split": "test-mini", "difficulty": "easy", "sub-category": "any",
    }  # fmt: skip
    rows = [item | {"id": f"q{i}", "audio_id": str(questions.parent / f"{i}.wav")} for i in range(4)]
    rows[1]["audio_id"], rows[2]["answer"] = "gone.wav", "bird"
    path, asked = tmp_path / "eval.json", []

    def note(*args, **kwargs):
        asked.append([question.id for question in kwargs["eval_dataset"]])
        raise Loaded

    monkeypatch.setattr(sys.modules[__name__], "loaded", note)

    def evaluate(rows, *flags):
        path.write_text(json.dumps(rows))
        return start("--eval_file", path, *flags)

    assert evaluate(rows)[0] == 2 and not asked
    with pytest.raises(Loaded):
        evaluate(rows, "--max_dropped", "0.25")
    assert asked == [["q0", "q2", "q3"]]
    (dropped,) = map(json.loads, (tmp_path / "out" / "dropped_eval.jsonl").read_text().splitlines())
    assert dropped["line"] == 2 and json.loads(dropped["text"])["id"] == "q1"
    unlabelled = [row | {"answer": "", "split": "test"} for row in rows if row["id"] != "q1"]
    status, said = evaluate(unlabelled)
    assert status == 2 and str(path) in said
    status, said = evaluate([rows[0] | {"task": 3}])
    assert status == 2 and "task" in said
    with pytest.raises(Loaded):
        start("--eval_file", questions)  # AVQA's format
    assert len(asked[1]) == 8


def test_a_run_without_a_step_writes_no_model(start, tmp_path):
    status, said = start("--max_steps", "-1", "--num_train_epochs", "0", loads=True)
    assert status == 2 and "--max_steps" in said
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_run_writes_its_model_log_and_list_of_dropped_rows(start, questions, tmp_path):
    rows = questions.read_text().splitlines()
    rows = [
        json.dumps(json.loads(row) | {"audio_path": str(questions.parent / f"{i}.wav")}) for i, row in enumerate(rows)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, rows[0].replace("0.wav", "gone.wav")]) + "\n")
    status, said = start("--max_dropped", "0.2", data=tmp_path / "train.jsonl", loads=True)
    assert status == 0, said
    out = tmp_path / "out"
    AutoProcessor.from_pretrained(out)
    assert (out / "model.safetensors").is_file() and len((out / "log.jsonl").read_text().splitlines()) == 3
    (dropped,) = map(json.loads, (out / "dropped.jsonl").read_text().splitlines())
    assert dropped["line"] == 9
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["data", "folder"])
def test_nodes_that_differ_or_share_no_folder_are_refused(small_model, questions, tmp_path, difference):
    """Two processes that take each other for another machine, as torchrun's variables tell them."""
    other = tmp_path / "other.jsonl"
    rows = [json.loads(row) for row in questions.read_text().splitlines()]
    for row in rows:
        row["audio_path"] = str(questions.parent / row["audio_path"])
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    port, nodes = free_port(), []
    for rank in range(2):
        different = rank == 1
        command = [
            sys.executable, "src/train.py", "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2",
            "--max_completion_length", "4", "--max_steps", "1", "--report_to", "none", "--disable_tqdm", "true",
            "--model_name_or_path", small_model,
            "--data_file", other if different and difference == "data" else questions,
            "--output_dir", tmp_path / (f"out{rank}" if difference == "folder" else "out"),
        ]  # fmt: skip
        place = dict(
            RANK=rank, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        variables = environment(**place)
        nodes.append(
            subprocess.Popen(list(map(str, command)), cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)
        )
    ends = [(node.communicate(timeout=300)[1], node.returncode) for node in nodes]
    expected = {"flags": "beta", "data": "data_file (content)", "folder": "OUT_DIR"}[difference]
    for said, status in ends:
        assert status == 2 and expected in said, said
    assert not list(tmp_path.glob("out*/*.safetensors"))
