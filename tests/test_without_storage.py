"""The passes of the full-size model on a fake device: a tensor that is left on the CPU, or has another dtype than its
partner, raises here as it would on a GPU, without the memory of 8.4 B parameters.

Not covered: kernels of a device (TRL's fused head has one for Triton), and autocast.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

import model.generation
import row_by_row
import trainer.grpo_trainer
from dataset.encode import Batch, join
from evaluation.decoding import Greedy, score
from memory_table import Settings, build, decode_last, longest_questions, policy_pass
from model.generation import embed_tokens, generate, prefill
from model.qwen2_audio import base_model, encode_clips, pad_clips
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.rollout import Rollout
from trainer.shared_prompt import unpack
from without_storage import place, without_storage

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
S = Settings(prompt=400, seconds=10, questions=2)
END = 0  # token that ends an answer


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that every build of PyTorch knows. It has no autocast, which the fused head asks for."""
    is_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device != "lazy" and is_enabled(device))
    return torch.device("lazy:0")


class EqualDtypes(TorchDispatchMode):
    """Raises for products of two dtypes, as real tensors do; fake ones do not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            dtypes = {tensor.dtype for tensor in args if isinstance(tensor, torch.Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{func} of more than one dtype: {dtypes}")
        return func(*args, **(kwargs or {}))


def full_size(shared, layers: int) -> tuple[nn.Module, dict[str, int]]:
    """Qwen2-Audio-7B with so many layers, as the trainer has it, on the meta device; and its sizes."""
    config = AutoConfig.from_pretrained(shared / "models" / "qwen2-audio-7b-no-weights")
    config.audio_config.encoder_layers = config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = config.text_config.layer_types[:layers]
    return build(config.to_json_string(), S)


def questions_of(model, *seconds: float) -> Batch:
    """A question for each length of a clip."""
    questions = []
    for length in seconds:
        settings = replace(S, questions=1, seconds=length, prompt=round(40 * length))
        questions.append(row_by_row.as_inputs(longest_questions(model, settings)))
    return join(questions, pad_id=1)


def policy(model, batch: Batch) -> None:
    policy_pass(model, batch, S).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert {(gradient.device, gradient.dtype) for gradient in gradients} == {(model.device, torch.bfloat16)}


def log_probs(model, batch: Batch) -> torch.Tensor:
    """The trainer's own method, a question at a time."""
    ids = batch.input_ids.new_ones(len(batch), S.generations, S.completion)
    mask, scores = torch.ones_like(ids), torch.zeros(len(batch), S.generations, device=model.device)
    sampled = Rollout([{}] * len(batch), batch, ids, mask, mask.sum(2), scores > 0, scores[..., None], scores)
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=nullcontext)
    self = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(per_device_train_batch_size=S.generations))
    return AudioGRPOTrainer.log_probs(self, model, sampled)[0]


def reference(model, batch: Batch) -> None:
    with torch.no_grad():
        logps = log_probs(model.eval(), batch)
    assert logps.shape == (len(batch), S.generations, S.completion) and logps.device == model.device


def encoder(model, batch: Batch) -> None:
    """Clips that the rollout encodes, and a policy pass on them."""
    clips = encode_clips(model.model, batch.input_features, batch.frames)
    policy_pass(model, batch.encoded_as(pad_clips(clips)), S).backward()


def rollout(model, batch: Batch) -> None:
    with torch.no_grad():
        hidden, cache = prefill(base_model(model), batch)
        assert hidden.shape == (2, 4096) and hidden.device == model.device
        assert {states.device for layer in cache.layers for states in (layer.keys, layer.values)} == {model.device}
        decode_last(model, batch, cache, S)


def evaluation(model, batch: Batch) -> None:
    """The long question's answer ends first."""
    batch = questions_of(model, 10, 4)
    greedy = Greedy(model, batch)

    def choose(logits, rows, completions) -> torch.Tensor:
        assert greedy(logits, rows, completions).device == model.device  # fake tokens have no values
        return torch.tensor([END if row == 0 and completions[0] else 7 for row in rows], device=model.device)

    with torch.no_grad():  # `__wrapped__`: without inference mode
        answers = generate.__wrapped__(model.eval(), batch, [END], 4, choose)
        logps = score.__wrapped__(model, batch.take([1]), [[7, 8, END], [9, END]])
    assert answers == [[7, END], [7, 7, 7, 7]]
    assert logps.shape == (2,) and logps.device == model.device


PASSES = [policy, reference, encoder, rollout, evaluation]


@pytest.mark.slow
def test_every_pass_of_the_full_size_model_stays_on_its_device(shared, elsewhere):
    model, sizes = full_size(shared, layers=32)
    assert sizes["trained"] == pytest.approx(8.4e9, rel=0.01)
    with without_storage() as memory, EqualDtypes():
        place(model, elsewhere)
        for run_pass in PASSES:
            run_pass(model, longest_questions(model, S))
        assert memory.peak > sizes["weights"]


@pytest.mark.parametrize("run_pass", [policy, reference, encoder, rollout])
@pytest.mark.parametrize("misplaced", ["input_features", "input_ids", "weight"])
def test_a_mixture_of_devices_is_found(shared, elsewhere, run_pass, misplaced):
    model, _ = full_size(shared, layers=2)
    with without_storage():
        place(model, elsewhere)
        batch = longest_questions(model, S)
        if misplaced == "weight":
            place(next(m for m in model.modules() if isinstance(m, nn.Linear)), "cpu")
        else:
            batch = replace(batch, **{misplaced: getattr(batch, misplaced).to("cpu")})
        with pytest.raises(RuntimeError, match="device"):
            run_pass(model, batch)


def test_a_mixture_of_dtypes_is_found(shared, elsewhere):
    model, _ = full_size(shared, layers=2)
    with without_storage(), EqualDtypes():
        place(model, elsewhere)
        layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
        layer.weight = nn.Parameter(layer.weight.detach().float())
        with pytest.raises(RuntimeError, match="dtype"):
            policy(model, longest_questions(model, S))


def ids_left_behind(model, ids):
    return nn.functional.embedding(torch.tensor(ids), model.get_input_embeddings().weight)


def source_left_behind(values, packed, *shape):
    return unpack(values, replace(packed, source=packed.source.cpu()), *shape)


@pytest.mark.parametrize(
    ("run_pass", "module", "correct", "wrong"),
    [
        (evaluation, model.generation, embed_tokens, ids_left_behind),
        (reference, trainer.grpo_trainer, unpack, source_left_behind),
    ],
)
def test_code_that_leaves_a_tensor_on_the_cpu_is_found(
    shared, elsewhere, monkeypatch, run_pass, module, correct, wrong
):
    monkeypatch.setattr(module, correct.__name__, wrong)
    model, _ = full_size(shared, layers=2)
    with without_storage():
        place(model, elsewhere)
        with pytest.raises(RuntimeError, match="device"):
            run_pass(model, longest_questions(model, S))
