"""How much memory a run takes on each device, calculated from its model's configuration before the model is loaded.

Weights, gradients and optimizer follow from the parameters of a model without storage. Activations and rollout are the
peaks of the trainers' own passes, run on such a model (`without_storage`), operator by operator. Layers are alike, so
that a deep model follows from three shallow ones. Left out: what would take less (`fitting.py`), the CUDA context, what
kernels take for themselves, and what the allocator loses between blocks; `RESERVED` is for these.

The policy's gradients are taken to be there before its pass, as they are from the second of accumulated passes on: an
upper bound without accumulation, where they come as the activations go.

Shapes: N questions, G generations, P prompt, C completion, V vocabulary.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from trl.trainer.utils import add_fused_lm_head

from dataset.audio import SAMPLE_RATE
from dataset.encode import Batch, count_audio_tokens, needed_frames
from model.branches import Branches
from model.generation import prefill
from model.qwen2_audio import (
    audio_token_id,
    base_model,
    encode_clips,
    encoder_is_frozen,
    freeze_parts,
    needed_frames_only,
    pad_clips,
    quantised_layers,
)
from model.without_storage import place, without_storage
from trainer.shared_prompt import IGNORE, pack, score, unpack

RESERVED = 0.08  # share of a device that is left for what cannot be calculated; an assumption, not a measurement
# DeepSpeed's defaults, in elements: what it reduces at once (twice, with overlap_comm), and what ZeRO-3 keeps gathered.
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
BYTES_OF_4_BIT = 0.5 + 4 / 64  # NF4 with a float32 scale per block of 64 (QLoRA, arXiv 2305.14314)
FEW = 2  # layers: what a third adds, any further one does


@dataclass(frozen=True)
class Settings:
    """What a run's memory depends on, beside its model."""

    processes: int = 1
    zero_stage: int = 0  # 0: no engine
    offload_optimizer: bool = False
    offload_weights: bool = False  # with ZeRO-3
    dtype: torch.dtype = torch.bfloat16  # of the weights
    autocast: bool = False  # to bfloat16, as mixed precision without an engine does
    moments: float = 2  # that the optimizer keeps of every weight, in units of a weight's size (float32 with an engine)
    lora_r: int = 0  # 0: no adapters
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    four_bit: bool = False
    freeze: tuple[str, ...] = ()
    checkpointing: bool = False
    supervised: bool = False  # no rollouts, no reference; the completion is the answer to learn
    beta: float = 0.04  # 0: no reference
    ref_offload: bool = False  # it waits on the CPU between its passes
    generations: int = 8
    questions: int = 1  # per process and forward pass
    steps_per_generation: int = 16  # forward passes that one rollout is for
    prompt: int = 1024  # tokens of the longest
    seconds: float = 30  # of the longest clip
    completion: int = 256  # tokens of the longest
    vllm: bool = False  # which samples in memory of its own


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device."""

    settings: Settings
    weights: int
    gradients: int
    optimizer: int
    reference: int
    buffers: int  # of the engine's communication
    rollout: int  # its cache at full length, or its prefill's peak
    asking: int  # a reference that waits on the CPU, and its pass (that of one that stays is under the policy's)
    activations: int  # of the policy's forward and backward pass
    step: int  # what the optimizer's step needs for itself
    host: int  # of the CPU's memory, per process

    @property
    def total(self) -> int:
        """The largest sum at one time: rollout, reference's and policy's pass and optimizer step follow each other."""
        held = self.weights + self.gradients + self.optimizer + self.reference + self.buffers
        return held + max(self.rollout, self.asking, self.activations, self.step)

    def fits(self, device_bytes: int) -> bool:
        return self.total <= (1 - RESERVED) * device_bytes


def estimate(config: PreTrainedConfig, settings: Settings) -> Estimate:
    """What a run of `settings` takes, from its model's configuration. For 8.4 B it takes seconds."""
    s = settings
    shapes = replace(s, processes=1, zero_stage=min(s.zero_stage, 1), offload_optimizer=False, offload_weights=False)
    shapes = replace(shapes, beta=0.0, ref_offload=False, moments=0, steps_per_generation=1)
    with _no_engine(), torch.random.fork_rng(devices=[]):
        sizes = _from_few_layers(_measure_policy_pass, config, shapes)
        rollout = asking = 0
        if s.ref_offload:
            asking = _from_few_layers(_measure_reference_pass, config, replace(shapes, checkpointing=False))["pass"]
        if not (s.supervised or s.vllm):
            whole = replace(shapes, questions=s.questions * s.steps_per_generation, checkpointing=False)
            rollout = max(_from_few_layers(_measure_rollout, config, whole).values())
    weights, base, trained = sizes["weights"], sizes["base"], sizes["trained"]
    activations = max(sizes["forward"], sizes["backward"])
    reference = base if s.beta and not s.lora_r and not s.supervised else 0
    gradients, step, buffers, host = sizes["gradients"], 0, 0, 0
    if s.ref_offload:
        host, asking, reference = reference, reference + asking, 0
    if s.zero_stage:
        reduced = gradients // trained * min(REDUCE_BUCKET, trained)
        optimizer = int(4 * (1 + s.moments) * trained) // s.processes  # float32 weights and AdamW's two moments
        gradients //= s.processes if s.zero_stage > 1 else 1
        step, buffers = 4 * trained // s.processes, 2 * reduced  # gradients in float32
        if s.zero_stage == 3:
            buffers += s.dtype.itemsize * min(MAX_LIVE, base // s.dtype.itemsize)
            rollout += 0 if s.vllm else weights  # gathered as a whole for it
            weights, reference = weights // s.processes, reference // s.processes
    else:
        optimizer = int(s.moments * gradients)
        gradients *= 2 if s.processes > 1 else 1  # DDP reduces copies of them
    if s.offload_optimizer:
        host, optimizer, gradients, step = host + optimizer + gradients + step, 0, 0, 0
    if s.offload_weights:
        host, weights, reference = host + weights + reference, 0, 0
    return Estimate(s, weights, gradients, optimizer, reference, buffers, rollout, asking, activations, step, host)


@contextmanager
def _no_engine() -> Iterator[None]:
    """Models are built as a whole, and passes run as without ZeRO-3, whatever engine the run will have."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def _from_few_layers(
    measure: Callable[[str, Settings], dict[str, int]], config: PreTrainedConfig, s: Settings
) -> dict[str, int]:
    """What `measure` gives of the whole model. Sizes and the peak of each phase grow by the same with every layer."""
    text, audio = config.text_config.num_hidden_layers, config.audio_config.encoder_layers
    if min(text, audio) <= FEW:
        return measure(config.to_json_string(), s)

    def shallow(text_layers: int, audio_layers: int) -> dict[str, int]:
        cut = deepcopy(config)
        cut.text_config.num_hidden_layers, cut.audio_config.encoder_layers = text_layers, audio_layers
        cut.text_config.layer_types = cut.text_config.layer_types[:text_layers]
        return measure(cut.to_json_string(), s)

    few, more_text, more_audio = shallow(FEW, FEW), shallow(FEW + 1, FEW), shallow(FEW, FEW + 1)
    return {
        name: size + (text - FEW) * (more_text[name] - size) + (audio - FEW) * (more_audio[name] - size)
        for name, size in few.items()
    }


@lru_cache
def _measure_policy_pass(config: str, s: Settings) -> dict[str, int]:
    """What `build` says of the sizes; and the pass's peaks in bytes, beside weights and gradients."""
    model, sizes = build(config, s)
    with without_storage() as memory:
        place(model, "cpu")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        held = memory.live
        batch = longest_questions(model, s, model.device)
        clips = _as_passes_have_them(batch, model, s)
        memory.peak = memory.live
        loss = policy_pass(model, batch, s, clips)
        forward, memory.peak = memory.peak, memory.live
        loss.backward()
    if s.four_bit:  # one layer at a time is there in full
        held -= max(layer.weight.nbytes for layer in quantised_layers(base_model(model)))
    return sizes | {"forward": forward - held, "backward": memory.peak - held}


@lru_cache
def _measure_reference_pass(config: str, s: Settings) -> dict[str, int]:
    """The peak in bytes of a pass without gradients, beside the model's weights."""
    model, _ = build(config, s)
    with without_storage() as memory, torch.no_grad():
        place(model, "cpu")
        held = memory.live
        batch = longest_questions(model, s, model.device)
        clips = _as_passes_have_them(batch, model, s)
        memory.peak = memory.live
        policy_pass(model, batch, s, clips)
    return {"pass": memory.peak - held}


@lru_cache
def _measure_rollout(config: str, s: Settings) -> dict[str, int]:
    """Peaks of a rollout in bytes, beside the model's weights."""
    model, _ = build(config, s)
    with without_storage() as memory, torch.no_grad(), autocast(s):
        place(model, "cpu")
        batch = longest_questions(model, s, model.device)
        memory.peak = held = memory.live
        clips = encode_clips(base_model(model).model, batch.input_features, batch.frames)
        encoded, memory.peak = memory.peak, memory.live
        _, cache = prefill(base_model(model), batch, clips)
        del clips
        prefilled, memory.peak = memory.peak, memory.live
        decode_last(model, batch, cache, s)
    return {"encoder": encoded - held, "prefill": prefilled - held, "decoding": memory.peak - held}


def build(config: str, s: Settings) -> tuple[PreTrainedModel, dict[str, int]]:
    """The model as the trainer has it, on the meta device, and its sizes; `config` is its configuration as JSON."""
    values = json.loads(config)
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values), dtype=s.dtype
        )
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    base = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if s.four_bit:
        weights = [layer.weight for layer in quantised_layers(model)]
        base += sum(int(weight.numel() * BYTES_OF_4_BIT) - weight.nbytes for weight in weights)
    if s.lora_r:
        lora = LoraConfig(r=s.lora_r, target_modules=list(s.lora_targets), task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        if s.zero_stage:
            model.to(s.dtype)  # the engine keeps all in one dtype
    freeze_parts(model, s.freeze)
    model.train()
    if s.checkpointing:
        base_model(model).activation_checkpointing_enable({"use_reentrant": False})
        if s.lora_r:
            model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    sizes = {"base": base, "weights": base + adapters, "gradients": sum(p.nbytes for p in trained)}
    return model, sizes | {"trained": sum(parameter.numel() for parameter in trained)}


def longest_questions(model: PreTrainedModel, s: Settings, device: torch.device) -> Batch:
    """The longest questions (N, P) with the longest clips."""
    audio, samples = model.config.audio_config, round(s.seconds * SAMPLE_RATE)
    frames = -(-samples // 160)
    ids = torch.ones(s.questions, s.prompt, dtype=torch.long, device=device)
    ids[:, : count_audio_tokens(samples)] = audio_token_id(base_model(model))
    width = needed_frames(frames, 2 * audio.max_source_positions)
    features = torch.zeros(s.questions, audio.num_mel_bins, width, device=device)
    return Batch(ids, torch.ones_like(ids), features, [frames] * s.questions)


def autocast(s: Settings):
    """The context of a pass in mixed precision, if that is what the run has."""
    return torch.autocast("cpu", torch.bfloat16) if s.autocast else nullcontext()


def _as_passes_have_them(batch: Batch, model: nn.Module, s: Settings) -> dict[str, Any]:
    """A batch's clips, encoded by the rollout where nothing of the encoder is trained."""
    backbone = base_model(model).model
    if s.supervised or not encoder_is_frozen(backbone):
        return batch.audio_inputs
    with torch.no_grad(), autocast(s):
        clips = encode_clips(backbone, batch.input_features, batch.frames)
    return {"encoded_clips": pad_clips(clips), "frames": batch.frames}


def policy_pass(model: nn.Module, batch: Batch, s: Settings, clips: dict[str, Any] | None = None) -> torch.Tensor:
    """A loss of N x G completions of the full length, or of N answers to learn. `clips` are as `score` takes them, by
    default the batch's."""
    if s.supervised:
        inputs = longest_answers(batch, s)
        with autocast(s), needed_frames_only(base_model(model)):
            return model(**inputs, fused_lm_head=True).loss
    ids = batch.input_ids.new_ones(len(batch), s.generations, s.completion)
    tokens = [s.generations * s.completion] * len(batch)
    packed = pack(batch.input_ids, batch.attention_mask, ids, torch.ones_like(ids), tokens)
    with autocast(s):
        output = score(model, base_model(model), packed, clips or batch.audio_inputs)
    return unpack(output.log_probs, packed, s.generations, s.completion).sum()


def longest_answers(batch: Batch, s: Settings) -> dict[str, Any]:
    """What supervised fine-tuning's collator makes of the longest questions with the longest answers, (N, P + C)."""
    ids = torch.cat([batch.input_ids, batch.input_ids.new_ones(len(batch), s.completion)], dim=1)
    labels = ids.clone()
    labels[:, : s.prompt] = IGNORE
    mask = torch.ones_like(ids)
    tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(dim=1) - 1, "labels": labels}
    return tokens | batch.audio_inputs


@torch.no_grad()
def decode_last(model: nn.Module, batch: Batch, cache, s: Settings) -> None:
    """The last decoding step of N x G completions, from the cache of their N prompts."""
    earlier = s.generations * (s.completion - 1)  # tokens of a question's completions
    for layer in cache.layers:
        layer.keys = nn.functional.pad(layer.keys, (0, 0, 0, earlier))
        layer.values = nn.functional.pad(layer.values, (0, 0, 0, earlier))
    base, questions = base_model(model), len(batch.input_ids)
    branches = Branches(base, cache, nn.functional.pad(batch.attention_mask, (0, earlier), value=1))
    rows = [(question, branch) for question in range(questions) for branch in range(s.generations)]
    logits = base.get_output_embeddings()(branches.feed(batch.input_ids.new_ones(len(rows)), rows))
    logits.float().softmax(dim=-1)  # (N * G, V)
