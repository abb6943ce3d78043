"""What a training script says before the model is loaded: too few questions, a second run in one folder, other data."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import startup
import train
from dataset.lock import hold
from launch import packages
from trainer.resume import RECORD, check_resumable, checkpoints_in

FLAGS = (
    "--use_cpu", "true", "--questions_per_step", "2", "--num_generations", "2", "--max_completion_length", "4",
    "--max_steps", "2", "--save_steps", "1", "--report_to", "none", "--disable_tqdm", "true",
)  # fmt: skip


@pytest.fixture
def script(small_model, questions, tmp_path, monkeypatch):
    """Runs train.py in this process with further flags; the model is loaded only where a test lets it."""

    def main(*flags: str, data: Path = questions, build=None) -> None:
        places = ("--model_name_or_path", small_model, "--data_file", data, "--output_dir", tmp_path / "out")
        monkeypatch.setattr("sys.argv", ["train.py", *FLAGS, *map(str, places), *flags])
        startup.run_training(train.make_parser(), build or not_built)

    def not_built(*args):
        raise AssertionError("the model would be loaded")

    return main


def test_a_second_run_in_a_folder_is_refused_with_the_first_ones_process(script, tmp_path):
    with hold(tmp_path / "out" / startup.LOCK):
        with pytest.raises(SystemExit, match=r"train\.py: .*out: process \d+ on \S+ since .* writes there"):
            script()
    with pytest.raises(AssertionError, match="would be loaded"):
        script()
    assert not (tmp_path / "out" / startup.LOCK).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--report_to", "none"), None),
        (("--report_to", "tensorboard"), "--report_to tensorboard: .*; python -m pip install tensorboard"),
        (("--use_wandb", "true"), "--report_to wandb: .*; python -m pip install wandb"),
        (("--optim", "paged_adamw_8bit"), "--optim paged_adamw_8bit: needs the package bitsandbytes, which is not"),
        (("--use_liger_kernel", "true"), "--use_liger_kernel true: .*; python -m pip install liger-kernel"),
    ],
)
def test_a_package_that_a_flag_needs_is_said_before_the_model_is_loaded(script, monkeypatch, flags, message):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit if message else AssertionError, match=f"train.py: {message}" if message else "loaded"
    ):
        script(*flags)


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_an_output_folder_that_cannot_be_written_is_refused_at_once(script, tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit, match=r"train\.py: .*out: cannot be written to \(.*name another folder"):
        script("--output_dir", str(tmp_path / place))


def test_fewer_questions_than_a_step_takes_are_refused(script, questions, tmp_path):
    with pytest.raises(SystemExit, match="8 usable questions are fewer than the 9 .*--questions_per_step 8, or 1 more"):
        script("--questions_per_step", "9")
    with pytest.raises(SystemExit, match="8 usable questions are fewer than the 12 .*--questions_per_step 6"):
        script("--questions_per_step", "12", "--per_device_train_batch_size", "12")
    with pytest.raises(AssertionError, match="would be loaded"):
        script("--questions_per_step", "8")
    recipe = SimpleNamespace(per_device_train_batch_size=1, gradient_accumulation_steps=3, world_size=4)  # of SFT
    with pytest.raises(ValueError, match="3 usable questions are fewer than the 12 .* fewer than 4 processes"):
        startup.check_enough(3, recipe)
    startup.check_enough(12, recipe)


def test_a_reward_that_cannot_be_used_ends_in_a_sentence_before_the_model_is_loaded(script, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def few(completions):\n    return [1.0]\n")
    monkeypatch.setattr(train, "AudioGRPOTrainer", lambda **_: pytest.fail("the model would be loaded"))
    with pytest.raises(SystemExit, match=r"train\.py: reward few: returned 1 values for 2 completions; a list"):
        script("--reward_funcs", "accuracy", f"{tmp_path}/mine.py:few", build=train.build_trainer)


def test_the_evaluation_file_is_examined_as_the_training_file_is(script, questions, tmp_path, capsys):
    """A missing clip costs its row, or ends the run where there are more than --max_dropped; rows that are only not as
    they should be are asked, as in evaluation."""
    item = {
        "question": "What is in the audio?", "choices": ["dog", "cat"], "answer": "dog", "task": "sound",
        "split": "test-mini", "difficulty": "easy", "sub-category": "any",
    }  # fmt: skip
    rows = [item | {"id": f"q{i}", "audio_id": str(questions.parent / f"{i}.wav")} for i in range(4)]
    rows[1]["audio_id"], rows[2]["answer"] = "gone.wav", "bird"
    path = tmp_path / "eval.json"
    built = []

    def ask(rows, *flags):
        path.write_text(json.dumps(rows))
        script("--eval_file", str(path), *flags, build=lambda *parsed: built.append(parsed[2]) or pytest.fail("built"))

    with pytest.raises(SystemExit, match=r"more than 10% of the rows(.|\n)*eval.json: eval(.|\n)*clip missing +row 2"):
        ask(rows)
    with pytest.raises(pytest.fail.Exception):
        ask(rows, "--max_dropped", "0.25")
    assert [question.id for question in built[0].questions] == ["q0", "q2", "q3"]
    said = capsys.readouterr().out
    assert "4 rows, 3 usable, 1 dropped (25.0%)" in said and "`answer` not among the choices" in said
    (dropped,) = map(json.loads, (tmp_path / "out" / "dropped_eval.jsonl").read_text().splitlines())
    assert dropped["line"] == 2 and dropped["id"] == "q1"
    with pytest.raises(SystemExit, match="eval.json: holds no answers, so there is no accuracy"):
        ask([row | {"answer": "", "split": "test"} for row in rows if row["id"] != "q1"])
    with pytest.raises(SystemExit, match="`task` is 3, not a text"):
        ask([rows[0] | {"task": 3}])
    with pytest.raises(pytest.fail.Exception):
        script("--eval_file", str(questions), build=lambda *parsed: built.append(parsed[2]) or pytest.fail("built"))
    assert len(built[1].questions) == 8, "in AVQA's format"


def test_a_run_without_a_step_writes_no_model(script, tmp_path):
    def no_steps(*parsed):
        trainer = train.build_trainer(*parsed)
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
        return trainer

    with pytest.raises(SystemExit, match="no step was taken, so no model is written"):
        script(build=no_steps)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_run_records_what_decides_its_result_and_goes_on_with_the_same_alone(script, questions, tmp_path):
    out = tmp_path / "out"
    script(build=train.build_trainer)
    settings = check_resumable(out / "checkpoint-2")
    assert settings["questions_per_step"] == 2 and settings["engine"] == "none" and settings["use_peft"] is False
    assert len(settings["data_file (content)"]) == len(settings["model (weights)"]) == 16
    weights = (out / "model.safetensors").read_bytes()

    with pytest.raises(SystemExit, match="another run wrote"):
        script()
    (tmp_path / "changed.jsonl").write_text(
        "".join(
            json.dumps(json.loads(line) | {"audio_path": str(questions.parent / json.loads(line)["audio_path"])}) + "\n"
            for line in questions.read_text().splitlines()
        )
    )
    with pytest.raises(SystemExit, match=r"other settings.*data_file \(content\)"):
        script("--resume", data=tmp_path / "changed.jsonl")
    with pytest.raises(SystemExit, match="max_steps 2, now 3"):
        script("--resume", "--max_steps", "3")

    (out / "model.safetensors").unlink()
    script("--resume")  # all steps are taken
    assert (out / "model.safetensors").read_bytes() == weights
    script("--resume", "--max_steps", "3", "--force_resume", "true", build=train.build_trainer)
    assert [path.name for path in checkpoints_in(out) if (path / RECORD).exists()] == ["checkpoint-3"]
    script("--overwrite_output_dir", "true", build=train.build_trainer)
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-1", "checkpoint-2"]
