"""train.py and its launcher: the recipe, the derived accumulation, runs on real clips under every engine."""

import json
import shutil
from pathlib import Path

import pandas
import pytest
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

import train
from conftest import ROOT
from dataset.prompt import load_style
from run import arguments
from run.arguments import derive_accumulation
from run.checkpoints import read_settings
from running import free_port, run, skip_without_compiler

LAUNCHERS = sorted(path for path in ROOT.glob("*.sh"))
DEEPSPEED = ("ds_zero2", "ds_zero3")  # slow: DeepSpeed compiles its CPU operators at first use
SMALL_RUN = (
    "--use_cpu", "true", "--max_steps", "1", "--questions_per_step", "2", "--num_generations", "2",
    "--max_completion_length", "4",
)  # fmt: skip


PARTS = (train.DataArguments, train.RewardArguments, train.RecipeConfig, train.AudioModelConfig)


def parse(*words: str):
    return arguments.parse(PARTS, train.check, ["--use_cpu", "true", *words])


def test_defaults_are_the_papers_recipe(tmp_path):
    data, rewards, args, model = parse("--output_dir", str(tmp_path))
    expected = dict(
        questions_per_step=16, num_generations=8, per_device_train_batch_size=8, gradient_accumulation_steps=16,
        steps_per_generation=16, learning_rate=1e-6, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0,
        weight_decay=0.0, max_steps=1000, save_steps=100, save_only_model=False, keep_optimizer="newest", beta=0.04, loss_type="grpo",
        scale_rewards="group", use_bias_correction_kl=False, num_iterations=1, temperature=1.0, top_k=50, top_p=1.0,
        repetition_penalty=1.0, max_completion_length=256, seed=42, activation_checkpointing=False,
        gradient_checkpointing=False, logging_steps=1,
    )  # fmt: skip
    assert {key: getattr(args, key) for key in expected} == expected
    assert (data.prompt_style, rewards.reward_funcs, data.max_prompt_length) == ("answer", ["accuracy", "format"], 1024)
    assert model.model_name_or_path == "Qwen/Qwen2-Audio-7B-Instruct"


def test_flags(tmp_path):
    data, _, args, _ = parse(
        "--out_dir", str(tmp_path), "--beta", "0.001", "--num_generations", "4", "--loss_type", "dr_grpo",
        "--prompt_style", "think", "--log_completions", "true",
    )  # fmt: skip
    assert (args.output_dir, args.beta, args.loss_type) == (str(tmp_path), 0.001, "dr_grpo")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 16)
    assert data.prompt_style == "think" and args.log_completions
    assert parse("--use_wandb", "true")[2].report_to == ["wandb"]
    assert parse("--gradient_accumulation_steps", "3")[2].gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    ("questions", "per_pass", "processes", "expected"),
    [
        (16, 1, 8, 2),
        (16, 1, 1, 16),
        (16, 2, 4, 2),
        (16, 2, 2, 4),
        (6, 1, 3, 2),
        (16, 1, 2, 8),
        (16, 1, 4, 4),
        (16, 1, 16, 1),
    ],
)
def test_accumulation_is_derived(monkeypatch, questions, per_pass, processes, expected):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert derive_accumulation(questions, per_pass) == expected


def test_an_impossible_combination_is_refused_with_numbers_that_work(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError) as error:
        derive_accumulation(questions=16, per_pass=1)
    assert all(number in str(error.value) for number in ("--questions_per_step", "15", "18", "1, 2, 4, 8, 16"))
    for questions in (15, 18):
        assert derive_accumulation(questions, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="--questions_per_step 16.* 32.*--per_device_train_batch_size"):
        derive_accumulation(questions=16, per_pass=8)
    with pytest.raises(ValueError, match="--per_device_train_batch_size 12 .* 8 "):
        parse("--per_device_train_batch_size", "12", "--output_dir", str(tmp_path))


@pytest.fixture(scope="module")
def real_questions(shared, tmp_path_factory):
    """Two real clips with real-looking questions, in the paper's format."""
    rows = [
        {
            "id": i,
            "video_name": clip,
            "question_text": "What happened in the video?",
            "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"],
            "answer": i,
            "dataset_name": "AVQA",
            "audio_path": str(shared / "data" / "avqa" / f"{clip}.wav"),
        }
        for i, clip in enumerate(["0-00uubiDNU_000210", "008McBfX2O0_000000"])
    ]
    path = tmp_path_factory.mktemp("real") / "train_qa.data"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "engine"), [(1, ""), (2, "ds_zero3")])
def test_the_launcher_trains_on_real_clips(tiny_model, real_questions, tmp_path, processes, engine):
    skip_without_compiler(engine)
    done = run(
        "sh", "run_grpo.sh", "--use_cpu", "true", "--max_steps", "2", "--save_steps", "2", "--questions_per_step", "2",
        "--num_generations", "4", "--max_completion_length", "6", "--learning_rate", "1e-2",
        MODEL_NP=tiny_model, DATA_FILE=real_questions, OUT_DIR=tmp_path, GPU_NUM=processes, MASTER_PORT=free_port(),
        CONFIG=f"conf/{engine}.json" if engine else "",
    )  # fmt: skip
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum({"loss", "completions/mean_length", "step_time"} <= entry.keys() for entry in logged) == 2, done.stdout
    with safe_open(tiny_model / "model.safetensors", "pt") as base:
        base_names = set(base.keys())
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        with safe_open(folder / "model.safetensors", "pt") as saved:
            assert set(saved.keys()) == base_names
        assert load_style(folder) == "answer"
    model, loading = Qwen2AudioForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint-2", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint-2")
    assert processor.feature_extractor.n_samples == 480_000
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert read_settings(tmp_path / "checkpoint-2")["questions_per_step"] == 2


def steps_on_fixed_completions(model, data, folder, processes: int, config: str) -> list[dict]:
    """What two steps log."""
    run(
        "python", "-m", "torch.distributed.run", "--nproc_per_node", processes, "--standalone",
        "tests/train_on_fixed_completions.py", model, data, folder / "out", config, folder / "log.json",
    )  # fmt: skip
    return json.loads((folder / "log.json").read_text())


@pytest.fixture(scope="module")
def plain_steps(small_model, questions, tmp_path_factory):
    return steps_on_fixed_completions(small_model, questions, tmp_path_factory.mktemp("plain"), 1, "")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["", *DEEPSPEED])
def test_two_processes_take_the_steps_of_one_under_every_engine(plain_steps, small_model, questions, tmp_path, engine):
    skip_without_compiler(engine)
    config = f"conf/{engine}.json" if engine else ""
    found = steps_on_fixed_completions(small_model, questions, tmp_path, 2, config)
    assert len(plain_steps) == len(found) == 2
    for expected, step in zip(plain_steps, found, strict=True):
        assert expected["grad_norm"] > 1e-2
        assert step["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert step["kl"] == pytest.approx(expected["kl"], abs=1e-5)


@pytest.mark.slow
def test_a_converted_checkpoint_resumes_with_other_processes(small_model, questions, tmp_path):
    """ZeRO's state, by the commands of docs/TRAINING.md."""
    skip_without_compiler("ds_zero2")
    flags = (*SMALL_RUN, "--max_steps", "2", "--save_steps", "1", "--keep_optimizer", "all")
    start = tmp_path / "out" / "checkpoint-1"
    places = dict(MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=start.parent, CONFIG="conf/ds_zero2.json")
    run("sh", "run_grpo.sh", *flags, GPU_NUM=1, **places)
    resumed = ("sh", "run_grpo.sh", *flags, "--resume_from_checkpoint", start, "--overwrite_output_dir", "true")
    assert run(*resumed, GPU_NUM=2, check=False, **places).returncode == 2
    run(
        "python", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--input_folder",
        start / "global_step1", "--output_folder", start / "global_step1_universal",
    )  # fmt: skip
    settings = json.loads((ROOT / places["CONFIG"]).read_text()) | {"checkpoint": {"load_universal": True}}
    (tmp_path / "universal.json").write_text(json.dumps(settings))
    run(*resumed, GPU_NUM=2, **places | {"CONFIG": tmp_path / "universal.json"})
    assert read_settings(start.with_name("checkpoint-2"))["engine"] != read_settings(start)["engine"]


def uncomment_think(script: Path) -> None:
    """The edit that the README describes."""
    edited = script.read_text().replace("\n# PROMPT_STYLE=think\n", "\nPROMPT_STYLE=think\n")
    assert edited != script.read_text()
    script.write_text(edited)


@pytest.mark.slow
def test_editing_the_commented_lines_switches_prompt_reward_and_evaluation(small_model, questions, tmp_path):
    """And a row with a missing clip is dropped, recorded, and the run continues without it."""
    for name in (
        "run_grpo.sh",
        "test_mmau.sh",
        "setup_env.sh",
        "launch.sh",
        "paths.sh",
        "conf",
        "src",
        "requirements.txt",
    ):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    uncomment_think(tmp_path / "run_grpo.sh")
    (tmp_path / "probe.py").write_text("def asked(completions, style):\n    return [len(s) for s in style]\n")
    out, rows = tmp_path / "out", questions.read_text().splitlines()
    rows.insert(3, json.dumps(json.loads(rows[0]) | {"audio_path": "gone.wav"}))
    (questions.parent / "mixed.jsonl").write_text("\n".join(rows) + "\n")
    run(
        "sh", "run_grpo.sh", *SMALL_RUN, "--log_completions", "true", "--reward_funcs", "format", "probe.py:asked",
        "--max_dropped", "0.2", cwd=tmp_path, MODEL_NP=small_model, DATA_FILE=questions.parent / "mixed.jsonl",
        OUT_DIR=out, GPU_NUM=1,
    )  # fmt: skip
    (dropped,) = map(json.loads, (out / "dropped.jsonl").read_text().splitlines())
    assert dropped["line"] == 4 and "gone.wav" in dropped["message"]
    (table,) = (out / "completions").glob("*.parquet")
    prompts = pandas.read_parquet(table)["prompt"]
    assert len(prompts) == 4 and all("<think> </think>" in text for text in prompts)
    logged = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert logged["rewards/asked/mean"] == len("think")
    assert load_style(out / "checkpoint-1") == "think"

    row = {
        "id": "a", "audio_id": "0.wav", "question": "What?", "choices": ["dog", "cat"], "answer": "dog",
        "task": "sound", "difficulty": "easy", "sub-category": "any",
    }  # fmt: skip
    (questions.parent / "one.json").write_text(json.dumps([row]))
    places = dict(cwd=tmp_path, MMAU_DIR=questions.parent, OUT_DIR=out, GPU_NUM=1)

    def evaluated_style(name: str) -> str:
        run("sh", "test_mmau.sh", "--max_new_tokens", "4", **places, DATA_FILE=questions.parent / "one.json")
        return json.loads((out / "test_1" / name).read_text())["style"]

    assert evaluated_style("run_mmau_mini_tokens-4.json") == "think", "evaluation did not follow the record"
    (out / "checkpoint-1" / "prompt_style.json").unlink()
    uncomment_think(tmp_path / "test_mmau.sh")
    assert evaluated_style("run_mmau_mini_think_tokens-4.json") == "think"


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_are_posix(launcher):
    run(shutil.which("dash") or shutil.which("sh"), "-n", launcher)


@pytest.mark.slow
def test_bad_input_stops_the_run_without_a_traceback(small_model, questions, tmp_path):
    (value := tmp_path / "bad.data").write_text('{"question_text": "What?"}\n')
    done = run(
        "python", "src/train.py", *SMALL_RUN, "--data_file", value, "--model_name_or_path", small_model,
        "--output_dir", tmp_path / "out", check=False,
    )  # fmt: skip
    assert done.returncode == 2 and str(value) in done.stdout and "Traceback" not in done.stdout, done.stdout
