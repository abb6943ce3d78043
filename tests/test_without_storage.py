"""Placement of the full-size model's passes, on a device that this machine lacks: a tensor that is left on the CPU, or
has another dtype than its partner, stops them here as it would on a GPU, without the memory of 8.4 B parameters.

Leaves out what a device computes by its own kernels (TRL's fused head has one of Triton's), and autocast.
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
from model.generation import Greedy, embed_tokens, generate, prefill, score
from model.qwen2_audio import base_model, encode_clips, group_by_length, pad_clips
from model.without_storage import place, without_storage
from steps import Synchronisations
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.memory import Settings, build, decode_last, longest_questions, policy_pass
from trainer.shared_prompt import unpack

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
S = Settings(prompt=400, seconds=10, questions=2)
END = 0  # token that ends an answer


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that no build of PyTorch lacks; the fused head asks for its autocast, which it has not."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device != "lazy" and asked(device))
    return torch.device("lazy:0")


class EqualDtypes(TorchDispatchMode):
    """Products of two dtypes raise, as they do with real tensors; fake ones multiply anything."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            dtypes = {tensor.dtype for tensor in args if isinstance(tensor, torch.Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{func} of more than one dtype: {dtypes}")
        return func(*args, **(kwargs or {}))


def full_size(shared, layers: int) -> tuple[nn.Module, dict[str, int]]:
    """Qwen2-Audio-7B, all of its 32 layers or fewer, as the trainer has it, on the meta device; and its sizes."""
    config = AutoConfig.from_pretrained(shared / "models" / "qwen2-audio-7b-no-weights")
    config.audio_config.encoder_layers = config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = config.text_config.layer_types[:layers]
    return build(config.to_json_string(), S)


def questions_of(model, *seconds: float) -> Batch:
    """A question for each length of a clip, as the loader joins them."""
    questions = []
    for length in seconds:
        settings = replace(S, questions=1, seconds=length, prompt=round(40 * length))
        questions.append(row_by_row.as_inputs(longest_questions(model, settings, torch.device("cpu"))))
    return join(questions, pad_id=1).to(model.device)


def policy(model, batch: Batch) -> None:
    policy_pass(model, batch, S).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert {(gradient.device, gradient.dtype) for gradient in gradients} == {(model.device, torch.bfloat16)}


def log_probs(model, batch: Batch, batch_size: int | None = None, **state) -> torch.Tensor:
    """As the trainer takes them, with attributes of another `state` than a rollout's."""
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=nullcontext)
    trainer = object.__new__(AudioGRPOTrainer)  # with what the method reads
    vars(trainer).update(accelerator=accelerator, ref_model=None, _reference=None, use_vllm=False)
    vars(trainer).update({"_clips": batch.audio_inputs, "_tokens": [], "_idle": []} | state)
    ids = batch.input_ids.repeat_interleave(S.generations, dim=0)
    ids = torch.cat([ids, ids.new_ones(len(ids), S.completion)], dim=1)
    return trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), S.completion, batch_size)[0]


def reference(model, batch: Batch) -> None:
    """A question at a time."""
    with torch.no_grad():
        logps = log_probs(model.eval(), batch, batch_size=S.generations)
    assert logps.shape == (len(batch) * S.generations, S.completion) and logps.device == model.device


def rollout(model, batch: Batch) -> None:
    with torch.no_grad():
        hidden, cache = prefill(base_model(model), batch)
        assert hidden.shape == (2, 4096) and hidden.device == model.device
        assert {states.device for layer in cache.layers for states in (layer.keys, layer.values)} == {model.device}
        decode_last(model, batch, cache, S)


def evaluation(model, batch: Batch) -> None:
    """The long question's answer ends first, so its row leaves."""
    batch = questions_of(model, 10, 4)
    greedy = Greedy(model, batch)

    def choose(logits, rows, completions) -> torch.Tensor:
        assert greedy(logits, rows, completions).device == model.device  # which tokens these are, nobody knows
        return torch.tensor([END if row == 0 and completions[0] else 7 for row in rows], device=model.device)

    with torch.no_grad():  # `__wrapped__`: without inference mode, which fake tensors do not bear
        answers = generate.__wrapped__(model.eval(), batch, [END], 4, choose)
        logps = score.__wrapped__(model, batch.take([1]), [[7, 8, END], [9, END]])
    assert answers == [[7, END], [7, 7, 7, 7]]
    assert logps.shape == (2,) and logps.device == model.device


PASSES = [policy, reference, rollout, evaluation]


@pytest.mark.slow
def test_every_pass_of_the_full_size_model_stays_on_its_device(shared, elsewhere):
    model, sizes = full_size(shared, layers=32)
    assert sizes["trained"] == pytest.approx(8.4e9, rel=0.01)
    with without_storage() as memory, EqualDtypes():
        place(model, elsewhere)
        for run_pass in PASSES:
            run_pass(model, longest_questions(model, S, model.device))
        assert memory.peak > sizes["weights"]


@pytest.mark.parametrize("run_pass", [policy, reference, rollout])
@pytest.mark.parametrize("misplaced", ["input_features", "input_ids", "weight"])
def test_a_mixture_of_devices_is_found(shared, elsewhere, run_pass, misplaced):
    model, _ = full_size(shared, layers=2)
    with without_storage():
        place(model, elsewhere)
        batch = longest_questions(model, S, model.device)
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
            policy(model, longest_questions(model, S, model.device))


@pytest.mark.parametrize("way", ["plain", "eager", "frozen encoder", "a group left out", "supervised"])
def test_a_policy_pass_never_waits_for_the_device(shared, elsewhere, way):
    """Forward and backward, with clips of several lengths. Left out, since they do it on real tensors of a GPU alone:
    TRL's fused head picks the positions with a label, and in supervised training transformers looks for padding."""
    model, _ = full_size(shared, layers=2)
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    with without_storage():
        place(model, elsewhere)
        batch = questions_of(model, 10, 9.5, 4)
        assert len(group_by_length(batch.frames)) == 2 and len(set(batch.frames)) == 3
        state = {"_tokens": [S.generations * S.completion] * len(batch)}
        if way == "frozen encoder":
            encoded = encode_clips(model.model, batch.input_features, batch.frames)
            state["_clips"] = {"encoded_clips": pad_clips(encoded), "frames": batch.frames}
        if way == "a group left out":
            entropies = torch.zeros(len(batch), S.generations, S.completion, device=elsewhere)
            state |= {"_idle": [False, True, False], "_rollout_entropies": entropies}
        with Synchronisations(elsewhere) as waits:
            if way == "supervised":
                policy_pass(model, batch, replace(S, supervised=True)).backward()
            else:
                log_probs(model, batch, **state).sum().backward()
    assert waits.count == 0


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
            run_pass(model, longest_questions(model, S, model.device))
