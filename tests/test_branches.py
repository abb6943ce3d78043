"""Rollouts as branches against every completion in a row of its own."""

import json

import pytest
import torch
from transformers import GenerationConfig, Qwen2AudioForConditionalGeneration

import row_by_row
from dataset.encode import encode_question, join
from model.branches import check_generation, draw, roll_out
from model.qwen2_audio import end_ids, load_processor
from running import free_port, run, skip_without_compiler
from test_generation import SAMPLES, TEXTS

GENERATIONS, LONGEST = 4, 24


@pytest.fixture(scope="module")
def processor(small_model):
    return load_processor(small_model)


@pytest.fixture(params=["sdpa", "eager"])
def model(small_model, processor, request):
    """A model whose completions end after different numbers of tokens."""
    model = Qwen2AudioForConditionalGeneration.from_pretrained(small_model, attn_implementation=request.param).eval()
    with torch.no_grad():
        model.lm_head.weight[end_ids(processor)] *= 2
    return model


@pytest.fixture(scope="module")
def batch(processor):
    noise = torch.Generator().manual_seed(0)
    clips = [0.1 * torch.randn(samples, generator=noise).numpy() for samples in SAMPLES]
    return join([encode_question(processor, *it) for it in zip(TEXTS, clips, strict=True)], pad_id=0)


@pytest.fixture
def config(processor):
    return GenerationConfig(
        do_sample=True,
        top_k=0,
        repetition_penalty=1.1,  # knows its rows
        max_new_tokens=LONGEST,
        eos_token_id=end_ids(processor),
        pad_token_id=0,
    )


def count_tokens(model) -> list[int]:
    """The tokens of each call of the language model from now on, N * A."""
    counted: list[int] = []

    def count(module, args, kwargs):
        counted.append(kwargs["inputs_embeds"][..., 0].numel())

    model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    return counted


def test_every_token_is_drawn_from_the_distribution_of_its_own_row(model, batch, config):
    """Also once other branches, and whole questions, have ended."""
    steps: list[torch.Tensor] = []  # logits (R, V) of the rows that had not ended, in their order
    head = model.lm_head.register_forward_hook(lambda module, args, output: steps.append(output))
    torch.manual_seed(5)
    completions = roll_out(model, batch, GENERATIONS, config)
    head.remove()
    lengths = torch.tensor(list(map(len, completions))).view(-1, GENERATIONS)
    assert lengths.amax(dim=1).unique().numel() > 2 and (lengths.amin(dim=1) < lengths.amax(dim=1)).sum() > 2
    seen: list[list[torch.Tensor]] = [[] for _ in completions]
    for step, logits in enumerate(steps):
        going = [row for row, completion in enumerate(completions) if len(completion) > step]
        for row, own in zip(going, logits, strict=True):
            seen[row].append(own)
    rows = row_by_row.repeat_rows(row_by_row.whole_windows(model, row_by_row.as_inputs(batch)), GENERATIONS)
    for row, completion in enumerate(completions):
        one = {key: value[row : row + 1] for key, value in rows.items()}
        tokens = torch.tensor([completion])
        one["input_ids"] = torch.cat([one["input_ids"], tokens], dim=1)
        one["attention_mask"] = torch.cat([one["attention_mask"], torch.ones_like(tokens)], dim=1)
        with torch.no_grad():
            expected = model(**one).logits[0, -len(completion) - 1 : -1]
        torch.testing.assert_close(torch.stack(seen[row]), expected, atol=1e-4, rtol=1e-4)


def test_ended_branches_are_not_fed(model, batch, config):
    counted = count_tokens(model)
    torch.manual_seed(5)
    lengths = torch.tensor(list(map(len, roll_out(model, batch, GENERATIONS, config)))).view(-1, GENERATIONS)
    decoded = counted[-int(lengths.max()) + 1 :]
    for step, tokens in enumerate(decoded, start=1):
        going = (lengths > step).sum(dim=1)  # (N,), branches that a step feeds
        assert tokens == (going > 0).sum() * going.max()


def test_a_process_that_has_ended_takes_part_until_all_have(model, batch, config):
    """Under ZeRO-3 every forward pass needs all processes. Its own completions do not change."""
    torch.manual_seed(5)
    expected = roll_out(model, batch, GENERATIONS, config)
    counted = count_tokens(model)
    torch.manual_seed(5)
    steps = max(map(len, expected)) + 7
    votes = iter(range(steps))
    assert roll_out(model, batch, GENERATIONS, config, anyone=lambda going: next(votes) < steps - 1) == expected
    assert counted[-7:] == [1] * 7


def test_the_settings_decide_what_ends_a_completion(model, batch, config):
    config.max_new_tokens, config.min_new_tokens = 9, 9
    assert set(map(len, roll_out(model, batch, 2, config))) == {9}


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    shares = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = draw(shares.log().expand(40_000, -1))
    found = drawn.bincount(minlength=6) / 40_000
    assert (found[shares == 0] == 0).all()
    assert ((found - shares).abs() <= 5 * (shares * (1 - shares) / 40_000).sqrt()).all()
    assert draw(torch.tensor([[0.0, torch.nan], [0.0, -torch.inf]])).tolist() == [-1, 0]


@pytest.mark.parametrize(
    "settings",
    [dict(num_beams=2), dict(num_return_sequences=2), dict(guidance_scale=1.5), dict(encoder_repetition_penalty=1.2)],
)
def test_other_ways_to_generate_are_refused(settings):
    with pytest.raises(ValueError, match="--generation_kwargs"):
        check_generation(GenerationConfig(do_sample=True, **settings))


@pytest.mark.slow
def test_sampling_under_zero3_is_the_same_with_gathered_weights_and_without(small_model, questions, tmp_path):
    skip_without_compiler("ds_zero3")
    sampled = []
    for gathered in ("true", "false"):
        run(
            "sh", "run_grpo.sh", "--use_cpu", "true", "--max_steps", "2", "--questions_per_step", "4", "--num_generations", "2",
            "--max_completion_length", "24", "--save_strategy", "no", "--dtype", "float32", "--bf16", "false",
            "--ds3_gather_for_generation", gathered,
            MODEL_NP=small_model, DATA_FILE=questions, OUT_DIR=tmp_path / gathered, MASTER_PORT=free_port(), GPU_NUM=2,
            CONFIG="conf/ds_zero3.json", timeout=300,
        )  # fmt: skip
        lines = (tmp_path / gathered / "log.jsonl").read_text().splitlines()[:2]
        sampled.append([[json.loads(line)[key] for key in ("num_tokens", "completions/mean_length")] for line in lines])
    assert sampled[0] == sampled[1] and sampled[0][0] != sampled[0][1]
