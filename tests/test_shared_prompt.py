"""The shared prompt gives the log-probs and gradients of completions in separate rows."""

import pytest
import torch
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration
from trl.trainer.utils import add_fused_lm_head

from dataset.encode import count_audio_tokens
from row_by_row import log_probs as log_probs_row_by_row
from trainer.shared_prompt import IGNORE, pack, score, unpack

AUDIO, PAD, VOCABULARY = 290, 0, 300


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    config = Qwen2AudioConfig(
        audio_config=dict(
            model_type="qwen2_audio_encoder", num_mel_bins=16, d_model=32, encoder_layers=2, encoder_attention_heads=2,
            encoder_ffn_dim=64, max_source_positions=100,
        ),
        text_config=dict(
            model_type="qwen2", vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        ),
        audio_token_index=AUDIO,
        attn_implementation=request.param,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config).train()
    with torch.no_grad():  # the initial model is near uniform: a wrong mask would not show
        for parameter in model.parameters():
            parameter.mul_(3.0)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def make_batch(questions: int, generations: int, length: int, seed: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Prompts, clips and completions of different lengths; some completions have one token, some the full length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    frames = [int(draw(40, 200)) for _ in range(questions)]
    rows = []
    for frame in frames:
        audio = torch.full((count_audio_tokens(frame * 160),), AUDIO)
        rows.append(torch.cat([draw(1, AUDIO, int(draw(1, 6))), audio, draw(1, AUDIO, int(draw(1, 9)))]))
    width = max(map(len, rows))
    prompts = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows]),
        "attention_mask": torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long(),
        "input_features": torch.randn(questions, 16, 200, generator=generator),
        "feature_attention_mask": torch.stack([torch.arange(200) < frame for frame in frames]).long(),
    }
    lengths = draw(1, length + 1, questions, generations)
    lengths[0, 0], lengths[0, -1] = 1, length
    mask = (torch.arange(length) < lengths[..., None]).long()
    ids = draw(1, AUDIO, questions, generations, length).masked_fill(mask == 0, PAD)
    return prompts, ids, mask


def log_probs_shared(model, prompts: dict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    packed = pack(prompts["input_ids"], prompts["attention_mask"], ids, mask)
    frames = prompts["feature_attention_mask"].sum(dim=1).tolist()
    outputs = score(model, model, packed, {"input_features": prompts["input_features"], "frames": frames})
    return unpack(outputs.log_probs, packed, *ids.shape[1:])


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("questions", "generations", "length"), [(1, 2, 1), (1, 8, 12), (2, 4, 7), (3, 3, 20), (2, 16, 5)]
)
def test_log_probs_and_gradients_equal_row_by_row(model, questions, generations, length):
    prompts, ids, mask = make_batch(questions, generations, length, seed=generations)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))  # in the place of advantages
    shared = log_probs_shared(model, prompts, ids, mask)
    (shared * weights).sum().backward()
    shared_gradients = gradients(model)
    rows = log_probs_row_by_row(model, prompts, ids, mask)
    (rows * weights).sum().backward()
    row_gradients = gradients(model)

    torch.testing.assert_close(shared, rows, atol=1e-5, rtol=1e-5)
    assert set(shared_gradients) == set(row_gradients) and any("audio_tower" in name for name in row_gradients)
    for name, expected in row_gradients.items():
        difference = (shared_gradients[name] - expected).norm() / expected.norm().clamp(min=1e-8)
        assert difference < 1e-4 or expected.norm() < 1e-5, f"{name}: {difference:.1e}"


def test_gradients_with_activation_checkpointing_are_the_same(model):
    """The backward pass recomputes the encoder outside the context that registered its hooks."""
    prompts, ids, mask = make_batch(3, 2, 6, seed=3)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        log_probs_shared(model, prompts, ids, mask).sum().backward()
        found.append(gradients(model))
    model.gradient_checkpointing_disable()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, msg=name)


def test_a_completion_depends_on_no_other_completion(model):
    prompts, ids, mask = make_batch(2, 4, 6, seed=5)
    changed = ids.clone()
    changed[:, 1] = torch.where(mask[:, 1] == 1, (ids[:, 1] + 7) % AUDIO, PAD)
    before, after = log_probs_shared(model, prompts, ids, mask), log_probs_shared(model, prompts, changed, mask)
    untouched = [0, 2, 3]
    torch.testing.assert_close(before[:, untouched], after[:, untouched], atol=1e-5, rtol=1e-5)
    assert (before[:, 1] - after[:, 1]).abs().max() > 1e-2, "the model is too uniform to show a wrong mask"


def test_right_padded_prompts_are_refused():
    prompt, ids = torch.tensor([[1, 2, PAD]]), torch.tensor([[[11, 12], [21, PAD]]])
    with pytest.raises(RuntimeError, match="left-padded"):
        pack(prompt, (prompt != PAD).long(), ids, (ids != PAD).long())


def test_a_prompt_with_more_audio_tokens_than_its_clip_is_refused(model):
    prompts, ids, mask = make_batch(2, 2, 4, seed=1)
    prompts["input_ids"][0, -1] = AUDIO
    with pytest.raises(RuntimeError, match="audio tokens"):
        log_probs_shared(model, prompts, ids, mask)


def test_the_example_of_the_docstring():
    prompt = torch.tensor([[PAD, 1, 2, 3]])
    ids = torch.tensor([[[11, 12, 13], [21, 22, PAD]]])
    packed = pack(prompt, (prompt != PAD).long(), ids, (ids != PAD).long())
    assert packed.input_ids.tolist() == [[PAD, 1, 2, 3, 11, 12, 3, 21]]
    assert packed.position_ids.tolist() == [[0, 0, 1, 2, 3, 4, 2, 3]]
    assert packed.labels.tolist() == [[11, 12, 13, 21, 22]]
    drawn = ["x.......", ".x......", ".xx.....", ".xxx....", ".xxxx...", ".xxxxx..", ".xx...x.", ".xx...xx"]
    seen = ["".join("x" if cell else "." for cell in row) for row in packed.sees[0].tolist()]
    assert seen == drawn
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert unpack(values, packed, generations=2, length=3).tolist() == [[[1, 2, 3], [4, 5, 0]]]


def test_masked_completions_take_no_place_and_give_zero(model):
    prompts, ids, mask = make_batch(2, 3, 6, seed=9)
    mask[0, 1] = 0  # as mask_truncated_completions does
    mask[1] = 0  # a whole group
    packed = pack(prompts["input_ids"], prompts["attention_mask"], ids, mask)
    assert packed.source.shape[1] == mask[0].sum()
    assert (packed.labels[1] == IGNORE).all()
    shared = log_probs_shared(model, prompts, ids, mask)
    rows = log_probs_row_by_row(model, prompts, ids, mask)
    assert torch.isfinite(shared).all() and (shared[mask == 0] == 0).all()
    torch.testing.assert_close(shared, rows, atol=1e-5, rtol=1e-5)
