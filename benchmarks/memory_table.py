"""The table of docs/MEMORY.md: which settings fit which GPUs, calculated from a model's configuration.

    python benchmarks/memory_table.py [MODEL]

Weights, gradients and optimizer follow from the parameters of a model without storage. Activations and rollout are the
peaks of the trainer's own passes on such a model (`tests/without_storage.py`), operator by operator. Layers are alike:
the peaks of a deep model follow from three shallow ones. Not counted: the CUDA context, what kernels allocate, and gaps
between the allocator's blocks; `RESERVED` is for these.

The policy's pass counts with all gradients in memory, as from the second accumulated pass on.

Shapes: N questions, G generations, P prompt, C completion, V vocabulary.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("src", "tests")]

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from dataset.audio import SAMPLE_RATE
from dataset.encode import Batch, count_audio_tokens, needed_frames
from model.branches import Branches
from model.generation import prefill
from model.qwen2_audio import audio_token_id, base_model, encode_clips, freeze_parts
from run.arguments import LINEAR_LAYERS
from trainer.shared_prompt import pack, score, unpack
from without_storage import place, without_storage

GIB = 2**30
RESERVED = 0.08  # share of a device that is left for what is not counted; an assumption, not a measurement
# DeepSpeed's defaults, in elements: what it reduces at once (twice, with overlap_comm), and what ZeRO-3 keeps gathered.
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
BYTES_OF_4_BIT = 0.5 + 4 / 64  # NF4 with a float32 scale per block of 64 (QLoRA, arXiv 2305.14314)
MOMENTS = 2  # that AdamW keeps of every weight
FEW = 2  # layers of the shallow models: each further layer adds the same as the third


@dataclass(frozen=True)
class Settings:
    """What a run's memory depends on, beside its model."""

    processes: int = 1
    zero_stage: int = 0  # 2 or 3; 0: no engine
    offload_optimizer: bool = False
    dtype: torch.dtype = torch.bfloat16  # of the weights
    lora_r: int = 0  # 0: no adapters
    four_bit: bool = False
    checkpointing: bool = False
    beta: float = 0.04  # 0: no reference
    generations: int = 8
    questions: int = 1  # per process and forward pass
    steps_per_generation: int = 16  # forward passes of one rollout
    prompt: int = 400  # tokens of the longest
    seconds: float = 10  # of the longest clip
    completion: int = 256  # tokens of the longest


ZERO_2, ZERO_3, OFFLOADED = {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 2, "offload_optimizer": True}
CHECKPOINTING, ONCE = {"checkpointing": True}, {"steps_per_generation": 1}
LORA, FOUR_BIT = {"lora_r": 16}, {"lora_r": 16, "four_bit": True}
ROWS = (
    ("ds_zero2 (the paper)", ZERO_2),
    ("ds_zero2, checkpointing", ZERO_2 | CHECKPOINTING),
    ("ds_zero3, checkpointing", ZERO_3 | CHECKPOINTING),
    ("ds_zero2_offload, checkpointing", OFFLOADED | CHECKPOINTING),
    ("ds_zero2_offload, checkpointing, steps_per_generation 1", OFFLOADED | CHECKPOINTING | ONCE),
    ("LoRA, ds_zero2", ZERO_2 | LORA),
    ("LoRA, ds_zero2, checkpointing, steps_per_generation 1", ZERO_2 | LORA | CHECKPOINTING | ONCE),
    ("LoRA, 4-bit, no engine", FOUR_BIT),
    ("LoRA, 4-bit, no engine, checkpointing, steps_per_generation 1", FOUR_BIT | CHECKPOINTING | ONCE),
)


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    buffers: int  # of the engine's communication
    rollout: int  # the largest of encoder, prefill and the last decoding step
    activations: int  # of the policy's forward and backward pass
    step: int  # of the optimizer's step
    host: int  # of the CPU's memory, per process

    @property
    def total(self) -> int:
        """The largest sum at one time: rollout, policy's pass and optimizer step follow each other."""
        held = self.weights + self.gradients + self.optimizer + self.reference + self.buffers
        return held + max(self.rollout, self.activations, self.step)

    def fits(self, device_bytes: int) -> bool:
        return self.total <= (1 - RESERVED) * device_bytes


def estimate(config: PreTrainedConfig, s: Settings) -> Estimate:
    """The memory of a run with settings `s`, from its model's configuration. Takes seconds for 8.4 B parameters."""
    shapes = replace(s, processes=1, zero_stage=min(s.zero_stage, 1), offload_optimizer=False, beta=0.0)
    with torch.random.fork_rng(devices=[]):
        sizes = _from_few_layers(_measure_policy_pass, config, replace(shapes, steps_per_generation=1))
        whole = replace(shapes, questions=s.questions * s.steps_per_generation, checkpointing=False)
        rollout = max(_from_few_layers(_measure_rollout, config, whole).values())
    weights, trained, gradients = sizes["weights"], sizes["trained"], sizes["gradients"]
    activations = max(sizes["forward"], sizes["backward"])
    reference = sizes["base"] if s.beta and not s.lora_r else 0
    step = buffers = host = 0
    if s.zero_stage:
        buffers = 2 * gradients // trained * min(REDUCE_BUCKET, trained)
        optimizer = 4 * (1 + MOMENTS) * trained // s.processes  # float32 weights and moments
        gradients //= s.processes
        step = 4 * trained // s.processes  # gradients in float32
        if s.zero_stage == 3:
            buffers += s.dtype.itemsize * min(MAX_LIVE, sizes["base"] // s.dtype.itemsize)
            rollout += weights  # gathered as a whole for it
            weights, reference = weights // s.processes, reference // s.processes
    else:
        optimizer = MOMENTS * gradients
        gradients *= 2 if s.processes > 1 else 1  # DDP reduces copies of them
    if s.offload_optimizer:
        host, optimizer, gradients, step = optimizer + gradients + step, 0, 0, 0
    return Estimate(weights, gradients, optimizer, reference, buffers, rollout, activations, step, host)


def _from_few_layers(measure, config: PreTrainedConfig, s: Settings) -> dict[str, int]:
    """The sizes that `measure` gives for the whole model: all grow by the same with every layer."""
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
    """The sizes of `build`, and the pass's peaks in bytes, beside weights and gradients."""
    model, sizes = build(config, s)
    with without_storage() as memory:
        place(model, "cpu")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        held = memory.live
        batch = longest_questions(model, s)
        memory.peak = memory.live
        loss = policy_pass(model, batch, s)
        forward, memory.peak = memory.peak, memory.live
        loss.backward()
    if s.four_bit:  # one layer at a time is there in full
        held -= max(layer.weight.nbytes for layer in quantised_layers(model))
    return sizes | {"forward": forward - held, "backward": memory.peak - held}


@lru_cache
def _measure_rollout(config: str, s: Settings) -> dict[str, int]:
    """Peaks of a rollout in bytes, beside the model's weights."""
    model, _ = build(config, s)
    with without_storage() as memory, torch.no_grad(), autocast(s):
        place(model, "cpu")
        batch = longest_questions(model, s)
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
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model = AutoModelForMultimodalLM.from_config(config, dtype=s.dtype)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    base = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if s.four_bit:
        weights = [layer.weight for layer in quantised_layers(model)]
        base += sum(int(weight.numel() * BYTES_OF_4_BIT) - weight.nbytes for weight in weights)
    if s.lora_r:
        lora = LoraConfig(r=s.lora_r, target_modules=list(LINEAR_LAYERS), task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        if s.zero_stage:
            model.to(s.dtype)  # the engine keeps all in one dtype
    freeze_parts(model, ())
    model.train()
    if s.checkpointing:
        base_model(model).activation_checkpointing_enable({"use_reentrant": False})
        if s.lora_r:
            model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    sizes = {"base": base, "weights": base + adapters, "gradients": sum(p.nbytes for p in trained)}
    return model, sizes | {"trained": sum(parameter.numel() for parameter in trained)}


def quantised_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers that `NOT_QUANTISED` leaves to be stored in 4 bits."""
    return [layer for layer in base_model(model).model.language_model.modules() if isinstance(layer, nn.Linear)]


def longest_questions(model: PreTrainedModel, s: Settings) -> Batch:
    """The longest questions (N, P) with the longest clips, on the model's device."""
    audio, samples = model.config.audio_config, round(s.seconds * SAMPLE_RATE)
    frames = -(-samples // 160)
    ids = torch.ones(s.questions, s.prompt, dtype=torch.long, device=model.device)
    ids[:, : count_audio_tokens(samples)] = audio_token_id(base_model(model))
    width = needed_frames(frames, 2 * audio.max_source_positions)
    features = torch.zeros(s.questions, audio.num_mel_bins, width, device=model.device)
    return Batch(ids, torch.ones_like(ids), features, [frames] * s.questions)


def autocast(s: Settings):
    """The context of a pass: engines convert weights and inputs themselves."""
    return torch.autocast("cpu", torch.bfloat16) if s.four_bit else nullcontext()


def policy_pass(model: nn.Module, batch: Batch, s: Settings) -> torch.Tensor:
    """A loss of N x G completions of the full length."""
    ids = batch.input_ids.new_ones(len(batch), s.generations, s.completion)
    packed = pack(batch.input_ids, batch.attention_mask, ids, torch.ones_like(ids))
    with autocast(s):
        output = score(model, base_model(model), packed, batch.audio_inputs)
    return unpack(output.log_probs, packed, s.generations, s.completion).sum()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", nargs="?", default="Qwen/Qwen2-Audio-7B-Instruct", help="folder or hub name")
    config = AutoConfig.from_pretrained(parser.parse_args().model, trust_remote_code=False)
    print("| settings | 1 device, CPU's | 8 devices, CPU's |\n| --- | --- | --- |")
    for flags, change in ROWS:
        cells = []
        for processes in (1, 8):
            found = estimate(
                config, Settings(**{"processes": processes, "steps_per_generation": 16 // processes} | change)
            )
            fits = next((f" fits {gib} GB" for gib in (24, 48, 80) if found.fits(gib * GIB)), "")
            cells.append(f"{found.total / GIB:.1f}{fits}, {found.host / GIB:.0f}")
        print(f"| {flags} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
