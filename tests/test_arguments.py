"""run/arguments.py: exact flags, YAML files, derived settings; impossible values are refused by name, in one line."""

import json
from dataclasses import fields

import pytest
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Qwen2AudioForConditionalGeneration

import train
import train_sft
from run.arguments import derive_accumulation, parse

PARTS = train.DataArguments, train.RewardArguments, train.RecipeConfig, train.AudioModelConfig
SFT_PARTS = train_sft.ChoiceDataArguments, train_sft.SFTRecipeConfig, train_sft.AudioModelConfig


def parse_line(line: str, *more: str) -> tuple:
    return parse(PARTS, train.check, ["--use_cpu", "true", *line.split(), *more])


@pytest.mark.parametrize(
    "line",
    [
        "--learning_rate abc",
        "--max_step 5",  # an abbreviation
        "--num_generation 4",
        "--bf16 maybe",
        "--num_generations 2.5",
        "--optim foo",
        "--freeze projektor",
        "--prompt_style thinking",
        "--keep_optimizer some",
        "--questions_per_step 0",
        "--per_device_train_batch_size 3",
        "--loss_type ppo",
        "--attn_implementation flash_attention_2",
        "--freeze projector language_model audio_encoder",
        "--sync_ref_model true --beta 0",
        "--sync_ref_model true --use_peft true",
        "--reward_weights 1",
        "--use_vllm true",  # with --top_k 50
        "--lora_target_modules q_proj lm_head",
        "--trust_remote_code true",
        "--generation_batch_size 12",
    ],
)
def test_impossible_value_is_refused_by_its_flag(line):
    with pytest.raises(ValueError) as refused:
        parse_line(line)
    assert line.split()[0].removeprefix("--") in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("line", ["--questions_per_step 0", "--prompt_style think", "--trust_remote_code true"])
def test_impossible_value_is_refused_in_supervised_fine_tuning(line):
    with pytest.raises(ValueError, match=line.split()[0].removeprefix("--")):
        parse(SFT_PARTS, None, ["--use_cpu", "true", *line.split()])


@pytest.mark.parametrize("name", ["train.py", "train_sft.py"])
@pytest.mark.parametrize(
    "line", ["--max_step 5", "--learning_rate abc", "--config gone.yaml", "--questions_per_step 0"]
)
def test_script_ends_with_one_line_and_status_2(script, name, line):
    status, said = script(name, "--use_cpu", "true", *line.split())
    assert status == 2 and said.count("\n") == 1 and name in said
    assert line.split()[0].removeprefix("--") in said or "gone.yaml" in said


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_step: 5", "max_step"),
        ("max_steps: 1.5", "max_steps"),
        ("prompt_style: thinking", "prompt_style"),
        ("beta: {", "--config"),
    ],
)
def test_config_file_obeys_the_same_rules(tmp_path, text, named):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=named) as refused:
        parse_line("", "--config", str(tmp_path / "run.yaml"))
    assert "\n" not in str(refused.value)


def test_config_file_gives_defaults_to_flags(tmp_path):
    settings = dict(max_steps=5, learning_rate="1e-5", use_cpu=True, reward_funcs=["accuracy"], freeze=["projector"])
    (tmp_path / "run.yaml").write_text(json.dumps(settings | {"resume_from_checkpoint": True}))
    words = ["--config", str(tmp_path / "run.yaml"), "--max_steps", "6"]
    data, rewards, args, _ = parse(PARTS, train.check, words)
    assert (args.max_steps, args.learning_rate, args.use_cpu) == (6, 1e-5, True)
    assert (rewards.reward_funcs, data.freeze, args.resume) == (["accuracy"], ["projector"], True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("q_proj", {"q_proj"}),
        ("q_proj v_proj", {"q_proj", "v_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "linear", "up_proj"}),
    ],
)
def test_layers_with_adapters_are_named_or_all(small_model, words, expected):
    *_, config = parse_line(f"--use_peft true --lora_target_modules {words}")
    model = get_peft_model(Qwen2AudioForConditionalGeneration.from_pretrained(small_model), config.adapters())
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert adapted >= expected and "lm_head" not in adapted
    assert words == "all-linear" or adapted == expected


@pytest.mark.parametrize(
    ("processes", "questions", "per_pass", "expected"),
    [(1, 16, 1, 16), (4, 16, 1, 4), (8, 16, 2, 1), (1, 16, 16, 1)],
)
def test_accumulation_makes_the_questions_of_a_step(monkeypatch, processes, questions, per_pass, expected):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert derive_accumulation(questions, per_pass) == expected


@pytest.mark.parametrize(
    ("processes", "questions", "per_pass", "working"),
    [(3, 16, 1, ("15", "18", "1, 2, 4, 8, 16")), (1, 16, 3, ("15", "18"))],
)
def test_accumulation_that_does_not_divide_names_what_does(monkeypatch, processes, questions, per_pass, working):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match="--questions_per_step") as refused:
        derive_accumulation(questions, per_pass)
    assert all(number in str(refused.value) for number in working)


def test_defaults_that_follow_from_others():
    *_, args, _ = parse_line("--num_generations 4 --questions_per_step 6 --eval_file x --save_steps 7")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.bf16) == (4, 6, False)
    assert (args.eval_strategy, args.eval_steps, args.metric_for_best_model) == ("steps", 7, "accuracy")
    *_, args, _ = parse_line("--keep_optimizer none")
    assert args.save_only_model and args.report_to == []


@pytest.mark.parametrize("parts", [PARTS, SFT_PARTS])
def test_no_flag_belongs_to_two_parts(parts):
    names = [field.name for part in parts for field in fields(part) if field.init]
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= {"trust_remote_code"}, twice
