"""Rollouts by vLLM. Where vLLM is installed (`sh setup_vllm.sh`): it samples what the trainer scores,
before and after the model has changed."""

import json
from importlib.util import find_spec
from itertools import pairwise

import llvmlite.binding  # noqa: F401, librosa loads it for clips of another rate than 16 kHz; engines must still start
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration
from trl import GRPOConfig

import row_by_row
from conftest import QUESTION, write_rows, write_tone
from dataset.dataset import load_train_dataset
from evaluation.checkpoints import load_merged
from model.qwen2_audio import PARTS, base_model
from run import vllm
from run.arguments import AudioModelConfig
from run.vllm import Engine, audio_token_forbidden, check_vllm, merged_tensors, sample_by_vllm
from running import free_port, run, skip_without_compiler
from runs import length_reward
from test_grpo_trainer import first_rows
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.rollout import Rollout

LORA = LoraConfig(
    r=4, target_modules=AudioModelConfig().lora_target_modules, task_type="CAUSAL_LM", init_lora_weights=False
)
AGREED = 1e-4  # nats, of any token's log-prob in float32; a tenth of it on average


def with_vllm(test):
    """For tests that start an engine."""
    reason = "vLLM is not installed here: sh setup_vllm.sh, then .venv-vllm/bin/python -m pytest -m vllm"
    return pytest.mark.vllm(pytest.mark.skipif(find_spec("vllm") is None, reason=reason)(test))


def make_trainer(model, questions, output_dir, use_vllm=True, peft_config=None, **settings) -> AudioGRPOTrainer:
    """With vLLM attached, whose engine it keeps as `engine`."""
    defaults = dict(
        num_generations=4, per_device_train_batch_size=8, max_completion_length=12, beta=0.0, learning_rate=1e-2,
        bf16=False, use_cpu=True, report_to="none", max_steps=3, logging_steps=1, activation_checkpointing=False,
    )  # fmt: skip
    args = GRPOConfig(str(output_dir), **defaults | settings)
    rows = load_train_dataset(questions)
    trainer = AudioGRPOTrainer(str(model), [length_reward], args, rows, peft_config=peft_config)
    if use_vllm:
        sample_by_vllm(trainer)
    return trainer


def engine_of(trainer) -> Engine:
    return trainer.sample.__self__


@pytest.fixture(scope="module")
def model_30s(tmp_path_factory):
    """A model with Qwen2-Audio's own window, as vLLM checks it, and heads as large as its kernels take."""
    from tiny import build_demo_model, build_processor

    folder = tmp_path_factory.mktemp("models") / "30s"
    processor = build_processor(["What is in the audio? ['dog', 'cat', 'bell'] <answer>dog</answer>"], seconds=30)
    build_demo_model(folder, processor, initializer_range=0.15)
    return folder


@pytest.fixture(scope="module")
def long_questions(tmp_path_factory):
    """With more audio tokens than a block of vLLM's prefix cache holds (128 on CPUs): shorter prompts are not kept."""
    folder = tmp_path_factory.mktemp("long")
    for i in range(4):
        write_tone(folder / f"{i}.wav", seconds=5 + 0.3 * i, frequency=200 * (i + 1))
    rows = [QUESTION | {"id": i, "answer": i % 3, "audio_path": f"{i}.wav"} for i in range(4)]
    return write_rows(folder, *rows)


@pytest.fixture(scope="module")
def trainer(model_30s, long_questions, tmp_path_factory):
    made = make_trainer(model_30s, long_questions, tmp_path_factory.mktemp("run"))
    yield made
    made.close()


def roll_out(trainer, new_step: bool = True) -> Rollout:
    trainer.model.train()
    trainer.state.global_step += new_step
    return trainer.roll_out(first_rows(trainer, 2))


def largest_difference(trainer, new_step: bool = True) -> float:
    """Of the log-probs of all sampled tokens, between trainer and vLLM; ten times the mean, if that is more."""
    rollout = roll_out(trainer, new_step)
    mask = rollout.mask.bool()
    assert mask.sum() > 16
    found = (rollout.old_logps - engine_of(trainer).sampled)[mask].abs()
    return max(found.max().item(), 10 * found.mean().item())


def change(model, parts) -> None:
    with torch.no_grad():
        for name, parameter in base_model(model).named_parameters():
            if parts & set(name.split(".")) and parameter.ndim > 1:
                parameter += 0.3 * parameter.std() * torch.randn_like(parameter)


# Without vLLM


def test_a_token_is_scored_without_the_audio_token(small_model, questions, tmp_path):
    """Log-probs and entropies of the trainer's passes against plain logits without the audio token's."""
    trainer = make_trainer(small_model, questions, tmp_path, use_vllm=False, temperature=0.7)
    audio, head = trainer.model.config.audio_token_id, trainer.model.lm_head
    with torch.no_grad():
        head.weight[audio] = head.weight.mean(0) + 0.3  # no small share
    rollout = roll_out(trainer)
    with audio_token_forbidden(trainer.model):
        logps, entropies = trainer.log_probs(trainer.model, rollout, entropy=True)
    usual, _ = trainer.log_probs(trainer.model, rollout)
    inputs, mask = (row_by_row.as_inputs(rollout.questions), rollout.ids, rollout.mask), rollout.mask.bool()
    torch.testing.assert_close(usual, row_by_row.log_probs(trainer.model, *inputs, 0.7), atol=1e-5, rtol=0)
    forward = head.forward
    head.forward = lambda hidden: forward(hidden).index_fill(-1, torch.tensor([audio]), -torch.inf)
    expected = row_by_row.log_probs(trainer.model, *inputs, 0.7)
    assert (expected - usual)[mask].max() > 1e-3
    torch.testing.assert_close(logps[mask], expected[mask], atol=1e-5, rtol=0)
    assert (entropies[mask] > 0).all() and head.bias is None
    logps[mask].sum().backward()
    assert head.weight.grad[audio].abs().max() == 0, "a token that cannot be drawn has no gradient"


@pytest.mark.parametrize("adapters", [None, LORA])
def test_pushed_tensors_are_those_of_a_checkpoint(small_model, questions, tmp_path, adapters):
    trainer = make_trainer(small_model, questions, tmp_path, use_vllm=False, peft_config=adapters)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    pushed = dict(merged_tensors(trainer.model, trainer._dist.gather_params))
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was changed"
    trainer.save_model(str(tmp_path / "saved"))
    whole = load_merged(tmp_path / "saved") if adapters else trainer.model
    whole.save_pretrained(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert set(pushed) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(pushed[name], tensor, msg=name)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("vllm_mode", "server"), ("vllm_tensor_parallel_size", 2), ("vllm_structured_outputs_regex", "a"),
        ("generation_kwargs", {"seed": 1}), ("top_k", 50), ("top_p", 0.9), ("min_p", 0.1), ("repetition_penalty", 1.1),
    ],
)  # fmt: skip
def test_settings_that_vllm_does_not_work_with(tmp_path, flag, value):
    args = GRPOConfig(str(tmp_path), use_vllm=True, bf16=False, use_cpu=True, **{flag: value})
    with pytest.raises(ValueError, match=f"--{flag}"):
        check_vllm(args, 1024)
    if flag in ("top_k", "top_p", "min_p", "repetition_penalty"):
        args.vllm_importance_sampling_correction = False
        check_vllm(args, 1024)


def test_quantised_weights_and_long_prompts_are_refused(tmp_path):
    args = GRPOConfig(str(tmp_path), use_vllm=True, bf16=False, use_cpu=True, vllm_max_model_length=1280)
    check_vllm(args, 1280 - args.max_completion_length)
    with pytest.raises(ValueError, match="--vllm_max_model_length"):
        check_vllm(args, 1281 - args.max_completion_length)
    with pytest.raises(ValueError, match="--use_vllm"):
        check_vllm(args, 256, quantised=True)


# With vLLM


@with_vllm
def test_the_sampler_and_the_trainer_agree_before_and_after_updates(trainer):
    assert largest_difference(trainer) < AGREED
    for parts in (PARTS["language_model"], PARTS["audio_encoder"], PARTS["projector"]):
        change(trainer.model, set(parts))
        assert largest_difference(trainer) < AGREED, f"after a change of {parts}"


@with_vllm
def test_a_cache_that_is_not_reset_would_show(trainer, monkeypatch):
    """The test above can fail: prompts' keys and values of the model before are another distribution."""
    for parts in (PARTS["language_model"], PARTS["audio_encoder"]):
        assert largest_difference(trainer) < AGREED
        with monkeypatch.context() as patched:
            patched.setattr(engine_of(trainer).llm, "reset_prefix_cache", lambda: None)
            change(trainer.model, set(parts))
            assert largest_difference(trainer) > 100 * AGREED
    assert largest_difference(trainer) < AGREED
    change(trainer.model, set(PARTS["language_model"]))
    assert largest_difference(trainer, new_step=False) > 100 * AGREED, "weights that were not pushed"


@with_vllm
def test_greedy_rollouts_equal_the_built_in_ones(trainer, long_questions, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_of(trainer).sampling, "top_k", 1)
    trainer.save_model(str(tmp_path / "saved"))
    greedy = dict(use_vllm=False, generation_kwargs={"do_sample": False})
    other = make_trainer(tmp_path / "saved", long_questions, tmp_path, **greedy)
    for rows in (first_rows(trainer, 2), first_rows(trainer, 4)[2:]):
        for one in (trainer, other):
            one.model.train()
            one.state.global_step += 1
        found, expected = (one.roll_out(rows).ids for one in (trainer, other))
        assert torch.equal(found, expected)
        assert len({tuple(row.tolist()) for row in found[:, 0]}) > 1, "all questions got one answer"


@with_vllm
def test_completions_follow_from_the_seed(trainer):
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(roll_out(trainer, new_step=False).ids)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len({tuple(row.tolist()) for row in drawn[0][0]}) > 1, "all completions of a group are one"


@with_vllm
def test_no_audio_token_is_sampled(trainer):
    audio = trainer.model.config.audio_token_id
    kept = trainer.model.lm_head.weight.detach().clone()
    with torch.no_grad():
        trainer.model.lm_head.weight[audio] = 3 * kept[5]  # the most probable token
    assert not (roll_out(trainer).ids == audio).any()
    with torch.no_grad():
        trainer.model.lm_head.weight.copy_(kept)


@with_vllm
def test_a_kept_clip_stops_the_run(trainer, monkeypatch):
    """vLLM's two halves disagree about the other cache, that of clips. The last test that uses this engine."""
    roll_out(trainer)
    monkeypatch.setattr(engine_of(trainer).llm.llm_engine, "reset_encoder_cache", lambda: None)
    with pytest.raises(RuntimeError, match="Encoder cache miss"):
        roll_out(trainer)


@with_vllm
def test_adapters(model_30s, questions, tmp_path):
    """In training: the difference is logged at every step, and every step changes the adapters."""
    trainer = make_trainer(model_30s, questions, tmp_path, peft_config=LORA)
    trainer.train()
    steps = [step for step in trainer.state.log_history if "reward" in step]
    assert len(steps) == 3 and all(step["grad_norm"] > 0 for step in steps)
    assert all(step["sampling/sampling_logp_difference/max"] < AGREED for step in steps), steps


@with_vllm
@pytest.mark.parametrize("engine", ["ds_zero3"])
def test_a_run_on_two_processes(model_30s, questions, tmp_path, engine):
    skip_without_compiler(engine)
    reward = "def reward(completions):\n    return [sum(c < 'n' for c in text) / max(len(text), 1) for text in completions]\n"
    (tmp_path / "reward.py").write_text(reward)
    done = run(
        "sh", "run_grpo.sh", "--use_cpu", "true", "--use_vllm", "true", "--max_steps", "3", "--questions_per_step", "4",
        "--num_generations", "4", "--max_completion_length", "8", "--top_k", "0", "--learning_rate", "1e-2",
        "--report_to", "none", "--reward_funcs", f"{tmp_path}/reward.py:reward",
        MODEL_NP=model_30s, DATA_FILE=questions, OUT_DIR=tmp_path / "run", GPU_NUM=2, MASTER_PORT=free_port(),
        CONFIG=f"conf/{engine}.json" if engine else "",
    )  # fmt: skip
    assert "Traceback" not in done.stdout, done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "reward" in step]
    assert len(steps) == 3 and all(step["sampling/sampling_logp_difference/max"] < AGREED for step in steps), steps
    assert all(before["kl"] != after["kl"] for before, after in pairwise(steps)), "the model did not change"
    Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "run")


@with_vllm
def test_the_benchmark_takes_its_steps_with_this_engine(tmp_path, monkeypatch):
    """Weights are pushed before every rollout, which is part of its cost."""
    from floor import SHARED
    from steps import Phases, Settings, build_contenders

    settings = Settings("tiny", questions=1, generations=2, seconds=1, completion=3, engine="vllm")
    one = build_contenders(settings, tmp_path, steps=2)[SHARED]
    pushed = []
    monkeypatch.setattr("run.vllm.push", lambda *args, push=vllm.push: pushed.append(1) or push(*args))
    for _ in range(2):
        one.step(phases := Phases(settings.device))
    assert len(pushed) == 2
    assert phases.seconds["decoding"] > 0 and "prefill" not in phases.seconds
