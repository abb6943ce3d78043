"""The training scripts' command lines: what cannot be is refused in one sentence, before anything is loaded."""

import json

import pytest

import train
import train_sft

JSON = "expected a JSON object"


@pytest.fixture(scope="module")
def parse():
    """Parses a line of flags as train.py does, on a CPU."""
    parser = train.make_parser()
    return lambda line, *more: parser.parse_args_and_config(["--use_cpu", "true", *line.split(), *more])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--learning_rate abc", "--learning_rate abc: expected a number"),
        ("--max_step 5", "there is no flag --max_step; did you mean --max_steps?"),
        ("--num_generation 4", "there is no flag --num_generation; did you mean --num_generations"),
        ("--bf16 maybe", "--bf16 maybe: expected true or false"),
        ("--num_generations 2.5", "--num_generations 2.5: expected a whole number"),
        ("--optim foo", "--optim foo: expected one of adamw_torch"),
        ("--config", "--config: a YAML file is expected"),
        ("--freeze projektor", "--freeze projektor: expected one of audio_encoder, projector, language_model"),
    ],
)
def test_what_is_no_flag_or_no_value_is_one_line_without_usage(parse, capsys, line, said):
    with pytest.raises(SystemExit):
        parse(line)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        *((f"--{flag} 0", f"--{flag} 0: expected 1 or more") for flag in (
            "per_device_train_batch_size", "per_device_eval_batch_size", "questions_per_step", "max_completion_length",
            "gradient_accumulation_steps", "steps_per_generation", "num_iterations", "lora_r", "lora_alpha",
            "max_prompt_length", "max_resample_rounds", "save_total_limit",
        )),
        *((f"--num_generations {n}", f"--num_generations {n}: expected 2 or more") for n in (0, 1, -2)),
        *((f"--{flag} 0", f"--{flag} 0: expected more than 0") for flag in (
            "temperature", "save_steps", "logging_steps", "epsilon", "top_p", "repetition_penalty",
        )),
        *((f"--{flag} -1", f"--{flag} -1: expected 0 or more") for flag in (
            "beta", "learning_rate", "weight_decay", "max_grad_norm", "top_k", "seed",
        )),
        *((f"--{flag} nan", f"--{flag} nan: expected a finite number") for flag in ("beta", "learning_rate", "max_dropped")),
        ("--max_steps 0", "--max_steps 0: expected -1 .* or 1 or more"),
        ("--max_dropped 2", "--max_dropped 2: expected a share, from 0 to 1"),
        ("--lora_dropout 1", "--lora_dropout 1: expected from 0 on and below 1"),
        ("--loss_type ppo", "--loss_type ppo: expected one of grpo, "),
        ("--scale_rewards std", "--scale_rewards std: expected one of group, batch, none"),
        ("--importance_sampling_level x", "expected one of token, sequence"),
        ("--lr_scheduler_type x", "--lr_scheduler_type x: expected one of linear, cosine"),
        ("--report_to wandbb", "--report_to wandbb: expected one of none, all"),
        ("--lr_scheduler_kwargs x", f"--lr_scheduler_kwargs x: {JSON}"),
        ("--generation_kwargs {x", "--generation_kwargs {x: not JSON"),
        ("--deepspeed gone.json", "--deepspeed gone.json: there is no such file"),
        ("--attn_implementation flash_attention_2", "expected one of sdpa, eager"),
        ("--freeze projector language_model audio_encoder", "nothing is left to train"),
        ("--sync_ref_model true --beta 0", "no reference model to update"),
        ("--sync_ref_model true --use_peft true", "--sync_ref_model true with --use_peft true"),
        ("--reward_weights 1", "1 weights for the 2 rewards accuracy format"),
        ("--use_vllm true", "--top_k 50 with --use_vllm true: .* give --top_k 0, or"),
        ("--use_vllm true --top_k 0 --vllm_max_model_length 1279", "and --max_completion_length 256 take 1280"),
        ("--use_vllm true --top_k 0 --load_in_4bit true", "not of 4 or 8 bits"),
        ("--lora_target_modules q_proj lm_head", "--lora_target_modules lm_head"),
        ("--trust_remote_code true", "--trust_remote_code true: code that comes with a model is never executed"),
        ('--model_init_kwargs {"trust_remote_code":true}', "--model_init_kwargs sets trust_remote_code"),
        ('--model_init_kwargs {"use_safetensors":false}', "--model_init_kwargs sets use_safetensors"),
        ("--auto_find_batch_size true", "auto_find_batch_size is not supported"),
        ("--generation_batch_size 12", "must be divisible by the global batch size"),
        ("--save_strategy epoch --load_best_model_at_end true", "requires the save and eval strategy to match"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_reason(parse, line, said):
    with pytest.raises(ValueError, match=said) as error:
        parse(line)
    assert "\n" not in str(error.value)


def test_an_engine_file_that_is_no_json_is_named_with_its_line(parse, tmp_path):
    (tmp_path / "engine.json").write_text('{"a": 1,\n}')
    with pytest.raises(ValueError, match=r"engine\.json, line 2: not JSON"):
        parse(f"--deepspeed {tmp_path / 'engine.json'}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_step: 5", "there is no flag --max_step; did you mean --max_steps?"),
        ("max_steps: 1.5", "--max_steps 1.5: expected a whole number"),
        ("prompt_style: thinking", "--prompt_style thinking: expected one of"),
        ("learning_rate: [1, x]", "--learning_rate x: expected a number"),
        ("beta: -1", "--beta -1: expected 0 or more"),
        ("beta: {", "--config: not YAML"),
        ("- beta", "must contain a YAML mapping"),
    ],
)
def test_a_config_file_is_held_against_the_same_rules(tmp_path, capsys, text, said):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises((SystemExit, ValueError)) as error:
        train.make_parser().parse_args_and_config(["--use_cpu", "true", f"--config={tmp_path / 'run.yaml'}"])
    assert said in capsys.readouterr().err + str(error.value)


def test_a_config_file_is_read_as_the_flags_are(tmp_path):
    settings = dict(max_steps=5, learning_rate="1e-5", use_cpu=True, reward_funcs="accuracy", freeze=["projector"])
    (tmp_path / "run.yaml").write_text(json.dumps(settings | {"scale_rewards": False, "resume_from_checkpoint": True}))
    words = ["--config", str(tmp_path / "run.yaml"), "--max_steps", "6"]
    data, rewards, args, _ = train.make_parser().parse_args_and_config(words)
    assert (args.max_steps, args.learning_rate, args.use_cpu, args.scale_rewards) == (6, 1e-5, True, "none")
    assert (rewards.reward_funcs, data.freeze, args.resume) == (["accuracy"], ["projector"], True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--per_device_train_batch_size 0", "expected 1 or more"),
        ("--questions_per_step 0", "expected 1 or more"),
        ("--trust_remote_code true", "never executed"),
        ("--lora_r -1", "--lora_r -1: expected 1 or more"),
    ],
)
def test_so_it_is_for_supervised_fine_tuning(line, said):
    with pytest.raises(ValueError, match=said):
        train_sft.make_parser().parse_args_and_config(["--use_cpu", "true", *line.split()])
