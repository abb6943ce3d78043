"""generation.py against the model's own forward and `generate`; decoding.py's answers against those of other batches."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import DynamicLayer, Qwen2AudioForConditionalGeneration

import row_by_row
from dataset.encode import encode_question, join, needed_frames
from evaluation import decoding
from evaluation.decoding import Greedy, Sampler, score
from model.generation import RoomyLayer, forbid_audio, generate, prefill
from model.qwen2_audio import encode_clips, end_ids, group_by_length, load_processor

TEXTS = [
    "What is in the audio?",
    "dog or cat?",
    "Is it a bell? Or a bell, a bell and a bell?",
    "What?",
    "<answer>cat</answer>",
]
SAMPLES = [32_000, 16_000, 5_000, 20_001, 31_999]  # the window is 2 s


@pytest.fixture(scope="module")
def processor(small_model):
    return load_processor(small_model)


@pytest.fixture
def model(small_model):
    return Qwen2AudioForConditionalGeneration.from_pretrained(small_model).eval()


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [rng.normal(scale=0.1, size=samples).astype(np.float32) for samples in SAMPLES]


@pytest.fixture(scope="module")
def questions(processor, clips):
    return [encode_question(processor, text, clip) for text, clip in zip(TEXTS, clips, strict=True)]


def argmax(model, logits, *_):
    """Greedy without lone passes, which would be counted as steps."""
    forbid_audio(model, logits)
    return logits.argmax(dim=1)


def generate_as_transformers(model, processor, clips, max_new_tokens, **more):
    inputs = row_by_row.encode(processor, TEXTS, clips)
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        suppress_tokens=[model.config.audio_token_id],
        eos_token_id=end_ids(processor),
        **more,
    )
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [min((row.index(end) for end in end_ids(processor) if end in row), default=len(row)) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("samples", [1_600, 5_000, 16_000, 31_900, 32_000])
def test_short_features_are_those_of_the_whole_window(processor, samples):
    clip = np.random.default_rng(1).normal(scale=0.1, size=samples).astype(np.float32)
    short, whole = encode_question(processor, "What?", clip), row_by_row.encode(processor, ["What?"], [clip])
    frames = needed_frames(-(-samples // 160), 200)
    assert torch.equal(short["input_ids"], whole["input_ids"])
    assert torch.equal(short["input_features"][:, :, :frames], whole["input_features"][:, :, :frames])
    assert short["feature_attention_mask"].sum() == whole["feature_attention_mask"].sum()


def test_the_encoder_on_needed_frames_is_the_encoder_on_the_whole_window(model, processor, clips, questions):
    batch = join(questions, pad_id=0)
    seen = {}
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_hook(lambda module, args, output: seen.update(whole=args[0]))
    with torch.no_grad():
        model(**row_by_row.encode(processor, TEXTS, clips))
        hook.remove()
        ours = torch.cat(encode_clips(model.model, batch.input_features, batch.frames))
    tokens = [int((row == model.config.audio_token_id).sum()) for row in batch.input_ids]
    whole = torch.cat([clip[:kept] for clip, kept in zip(seen["whole"], tokens, strict=True)])
    assert torch.allclose(ours, whole, atol=1e-5, rtol=1e-5)


def test_answers_are_those_of_transformers(model, processor, clips, questions):
    batch = join(questions, pad_id=0)
    ours = generate(model, batch, end_ids(processor), max_new_tokens=30, choose=Greedy(model, batch))
    assert ours == generate_as_transformers(model, processor, clips, 30)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_both_end_tokens_end_an_answer_and_ended_rows_leave_the_batch(model, processor, clips, questions, end):
    end = processor.tokenizer.convert_tokens_to_ids(end)
    batch, choose = join(questions, pad_id=0), partial(argmax, model)
    long = generate(model, batch, end_ids(processor), max_new_tokens=30, choose=choose)
    often = max({token for row in long for token in row}, key=[token for row in long for token in row].count)
    with torch.no_grad():  # `end` now stands where that token would
        model.lm_head.weight[end] = model.lm_head.weight[often] * 1.01
    sizes = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    ours = generate(model, batch, end_ids(processor), max_new_tokens=30, choose=choose)
    steps = sizes[len(group_by_length(batch.attention_mask.sum(dim=1).tolist())) :]  # after the prompts
    lengths = [len(row) for row in ours]
    assert any(row[-1] == end for row in ours)
    for step, size in enumerate(steps[: max(lengths) - 1], start=1):
        assert size == sum(length > step for length in lengths)
    assert len(steps) < 30 or max(lengths) == 30
    assert ours == generate_as_transformers(model, processor, clips, 30)


def test_audio_tokens_are_never_written(model, processor, questions):
    with torch.no_grad():
        model.lm_head.weight[model.config.audio_token_id] = 0
        for row in range(len(model.lm_head.weight)):
            if row != model.config.audio_token_id:
                model.lm_head.weight[row] = -model.lm_head.weight[row].abs()
    batch = join(questions, pad_id=0)
    for choose in (Greedy(model, batch), Sampler(model, batch, TEXTS, seed=0)):
        completions = generate(model, batch, end_ids(processor), max_new_tokens=5, choose=choose)
        assert all(model.config.audio_token_id not in row for row in completions)


def answer_in_batches(model, questions, sizes, ends):
    completions, start = [], 0
    for size in sizes:
        batch = join(questions[start : start + size], pad_id=0)
        completions += generate(model, batch, ends, max_new_tokens=20, choose=Greedy(model, batch))
        start += size
    return completions


def test_answers_do_not_depend_on_the_batch_even_where_tokens_tie(model, processor, questions, monkeypatch):
    """Every token has a twin whose logit differs by rounding alone: a plain argmax is a toss-up at every step."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        half = len(model.lm_head.weight) // 2
        weights = model.lm_head.weight[:half]
        towards = torch.randn(weights.shape, generator=random).sign() * torch.inf
        model.lm_head.weight[half : 2 * half] = torch.nextafter(weights, towards)  # other by the last bit
    ends = end_ids(processor)
    splits = ([5], [1] * 5, [2, 3], [4, 1])
    exact = [answer_in_batches(model, questions, sizes, ends) for sizes in splits]
    assert all(answers == exact[0] for answers in exact)
    choose = Greedy(model, join(questions, pad_id=0))
    generate(model, join(questions, pad_id=0), ends, max_new_tokens=20, choose=choose)
    assert choose.near_ties > 10
    monkeypatch.setattr(decoding, "NEAR_TIE", 0.0)
    plain = [answer_in_batches(model, questions, sizes, ends) for sizes in splits]
    assert any(answers != plain[0] for answers in plain), "the model has no ties to settle: the test shows nothing"


def test_draws_are_seeded_and_do_not_depend_on_the_batch(model, processor, questions):
    def draw(rows, seed):
        batch = join([questions[row] for row in rows], pad_id=0)
        sampler = Sampler(model, batch, [TEXTS[row] for row in rows], seed)
        return generate(model, batch, end_ids(processor), max_new_tokens=8, choose=sampler)

    together = draw([0, 1, 2, 3, 4], seed=1)
    assert together == draw([0, 1, 2, 3, 4], seed=1)
    assert together[1:3] == draw([1, 2], seed=1)
    assert together != draw([0, 1, 2, 3, 4], seed=2)


def test_score_is_the_log_probability_of_the_whole_reply(model, processor, clips, questions):
    replies = [[7, 8, 9], [10], [11, 12]]
    ours = score(model, join(questions[:1], pad_id=0), replies)
    for reply, logp in zip(replies, ours, strict=True):
        inputs = row_by_row.encode(processor, TEXTS[:1], clips[:1])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([reply])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -len(reply) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(reply)), reply].sum()
        assert logp == pytest.approx(expected.item(), abs=1e-4)


def states(generator, rows, tokens):
    """Keys and values that look like a model's: heads and tokens swapped in memory."""
    return torch.randn(2, rows, tokens, 3, 4, generator=generator).transpose(2, 3)


@pytest.mark.parametrize("select", [[0, 4, 2], [3], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("change", ["none", "repeat", "crop", "reorder"])
def test_the_cache_with_room_holds_what_the_plain_one_holds(select, change):
    random = torch.Generator().manual_seed(0)
    ours, plain = RoomyLayer(), DynamicLayer()
    prompts = states(random, 5, 20)
    before, grown = prompts.clone(), 0

    def extend(rows, tokens):
        nonlocal grown
        new, where = states(random, rows, tokens), ours.keys.data_ptr()
        for given, kept in zip(ours.update(*new), plain.update(*new), strict=True):
            assert torch.equal(given, kept)
        assert ours.get_seq_length() == plain.get_seq_length()
        grown += ours.keys.data_ptr() != where

    for layer in (ours, plain):
        layer.update(*prompts[..., :18, :])  # a view: what lies behind it is not ours to write to
    for tokens in (1, 1, 7, 1):
        extend(5, tokens)
    for layer in (ours, plain):
        layer.batch_select_indices(torch.tensor(select))
        if change == "repeat":
            layer.batch_repeat_interleave(2)
        elif change == "crop":
            layer.crop(-2)
        elif change == "reorder":
            layer.reorder_cache(torch.arange(len(select)).flip(0))
    rows = len(select) * (2 if change == "repeat" else 1)
    assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)
    for _ in range(40):
        extend(rows, 1)
    assert grown < 12
    assert torch.equal(prompts, before)


def test_prefill_returns_a_cache_that_is_written_in_place(model, questions):
    """A step copies no prompt: neither after the prompts, nor after a row has left."""
    batch = join(questions, pad_id=0)
    with torch.inference_mode():
        hidden, cache = prefill(model, batch)
        assert all(type(layer) is RoomyLayer for layer in cache.layers)
        places = []
        for step in range(8):
            if step == 4:
                cache.batch_select_indices(torch.tensor([0, 4, 2]))
            rows = cache.layers[0].keys.shape[0]
            model.model.language_model(inputs_embeds=hidden[:rows, None], past_key_values=cache, use_cache=True)
            places.append([layer.values.data_ptr() for layer in cache.layers])
    assert len(set(map(tuple, places))) <= 2


def test_groups_of_like_length():
    assert group_by_length([100, 40, 95, 91, 41]) == [[0, 2, 3], [4, 1]]
    assert group_by_length([]) == []
