"""How much memory a run will take on each device, before its model is loaded; and what would take less.

    python src/trainer/memory.py [MODEL]    prints the table of docs/MEMORY.md, from MODEL's configuration alone

Weights, gradients and optimizer follow from the parameters of a model without storage. Activations and rollout are the
peaks of the trainer's own passes, run on such a model (`without_storage`), operator by operator. Left out: the CUDA
context, what kernels take for themselves, and what the allocator loses between blocks; `RESERVED` is for these.

The policy's gradients are taken to be there before its pass, as they are from the second of accumulated passes on: an
upper bound without accumulation, where they come as the activations go.

Shapes: N questions, G generations, P prompt, C completion, V vocabulary.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedConfig
from trl.trainer.utils import add_fused_lm_head

from command_line import ArgumentParser, at_least
from dataset.audio import SAMPLE_RATE
from dataset.encode import Batch, count_audio_tokens, needed_frames
from model.generation import prefill
from model.qwen2_audio import audio_token_id, base_model, freeze_parts
from model.without_storage import place, without_storage
from trainer.shared_prompt import pack, score, unpack

GIB = 2**30
RESERVED = 0.08  # share of a device that is left for what cannot be calculated; an assumption, not a measurement
# DeepSpeed's defaults, in elements: what it reduces at once (twice, with overlap_comm), and what ZeRO-3 keeps gathered.
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000
BYTES_OF_4_BIT = 0.5 + 4 / 64  # NF4 with a float32 scale per block of 64 (QLoRA, arXiv 2305.14314)

CHECKPOINTING, ONCE, LORA = {"checkpointing": True}, {"steps_per_generation": 1}, {"lora_r": 16}
OFFLOADED = {"zero_stage": 2, "offload_optimizer": True}
ROWS = (
    ("ds_zero2 (the paper)", {"zero_stage": 2}),
    ("ds_zero2, checkpointing", {"zero_stage": 2} | CHECKPOINTING),
    ("ds_zero3, checkpointing", {"zero_stage": 3} | CHECKPOINTING),
    ("ds_zero2_offload, checkpointing", OFFLOADED | CHECKPOINTING),
    ("ds_zero2_offload, checkpointing, steps_per_generation 1", OFFLOADED | CHECKPOINTING | ONCE),
    ("LoRA, ds_zero2", {"zero_stage": 2} | LORA),
    ("LoRA, ds_zero2, checkpointing, steps_per_generation 1", {"zero_stage": 2} | LORA | CHECKPOINTING | ONCE),
    ("LoRA, 4-bit, checkpointing, steps_per_generation 1", {"four_bit": True} | LORA | CHECKPOINTING | ONCE),
)


@dataclass(frozen=True)
class Settings:
    """What a run's memory depends on, beside its model."""

    processes: int = 1
    zero_stage: int = 0  # 0: no engine
    offload_optimizer: bool = False
    offload_weights: bool = False  # with ZeRO-3
    dtype: torch.dtype = torch.bfloat16  # of the weights
    autocast: bool = False  # to bfloat16, as mixed precision without an engine does
    lora_r: int = 0  # 0: no adapters
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    four_bit: bool = False
    freeze: tuple[str, ...] = ()
    checkpointing: bool = False
    beta: float = 0.04  # 0: no reference
    generations: int = 8
    questions: int = 1  # per process and forward pass
    steps_per_generation: int = 16  # forward passes that one rollout is for
    prompt: int = 1024  # tokens of the longest
    seconds: float = 30  # of the longest clip
    completion: int = 256  # tokens of the longest


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
    activations: int  # of the policy's forward and backward pass
    step: int  # what the optimizer's step needs for itself
    host: int  # of the CPU's memory, per process

    @property
    def total(self) -> int:
        """The largest sum at one time: rollout, policy pass and optimizer step follow each other."""
        held = self.weights + self.gradients + self.optimizer + self.reference + self.buffers
        return held + max(self.rollout, self.activations, self.step)

    def fits(self, device_bytes: int) -> bool:
        return self.total <= (1 - RESERVED) * device_bytes

    def line(self) -> str:
        names = ("weights", "gradients", "optimizer", "reference", "buffers", "rollout", "activations")
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.1f}" for name in names)
        host = f"; {self.host / GIB:.1f} of the CPU's memory" if self.host else ""
        return f"memory per device, GiB, calculated: {self.total / GIB:.1f} at most ({parts}){host}"


def estimate(config: PreTrainedConfig, settings: Settings) -> Estimate:
    """What a run of `settings` takes, from its model's configuration. For 8.4 B it takes up to half a minute."""
    s = settings
    shapes = replace(s, processes=1, zero_stage=min(s.zero_stage, 1), offload_optimizer=False, offload_weights=False)
    shapes = replace(shapes, beta=0.0, steps_per_generation=1)
    sizes, activations = _measure_policy_pass(config.to_json_string(), shapes)
    whole = replace(shapes, questions=s.questions * s.steps_per_generation, checkpointing=False)
    rollout = _measure_rollout(config.to_json_string(), whole)
    weights, base, trained = sizes["weights"], sizes["base"], sizes["trained"]
    reference = base if s.beta and not s.lora_r else 0
    gradients, step, buffers, host = sizes["gradients"], 0, 0, 0
    if s.zero_stage:
        reduced = gradients // trained * min(REDUCE_BUCKET, trained)
        optimizer = 12 * trained // s.processes  # float32 weights and AdamW's two moments
        gradients //= s.processes if s.zero_stage > 1 else 1
        step, buffers = 4 * trained // s.processes, 2 * reduced  # gradients in float32
        if s.zero_stage == 3:
            buffers += s.dtype.itemsize * min(MAX_LIVE, base // s.dtype.itemsize)
            rollout += weights  # gathered as a whole for it
            weights, reference = weights // s.processes, reference // s.processes
    else:
        optimizer = 2 * gradients
        gradients *= 2 if s.processes > 1 else 1  # DDP reduces copies of them
    if s.offload_optimizer:
        host, optimizer, gradients, step = optimizer + gradients + step, 0, 0, 0
    if s.offload_weights:
        host, weights, reference = host + weights + reference, 0, 0
    return Estimate(s, weights, gradients, optimizer, reference, buffers, rollout, activations, step, host)


def advise(config: PreTrainedConfig, found: Estimate, device_bytes: int) -> None:
    """Raise a `ValueError` where a run does not fit its devices, with settings that would: each change alone, then with
    all that only take time; what adds to a change that is enough is left out."""
    if found.fits(device_bytes):
        return
    s = found.settings
    lighter = [("--activation_checkpointing true", CHECKPOINTING), ("--steps_per_generation 1", ONCE)]
    if s.questions > 1:
        fewer = {"questions": 1, "steps_per_generation": s.steps_per_generation * s.questions}
        lighter.insert(0, (f"--per_device_train_batch_size {s.generations}", fewer))
    engine = {"dtype": torch.bfloat16, "autocast": False, "offload_optimizer": False, "offload_weights": False}
    stages = (2, 3) if s.processes > 1 else ()
    others = [(f"CONFIG=conf/ds_zero{stage}.json", engine | {"zero_stage": stage}) for stage in stages]
    others.append(("CONFIG=conf/ds_zero2_offload.json", engine | OFFLOADED))
    others.append(
        ("CONFIG=conf/ds_zero3_offload.json", engine | OFFLOADED | {"zero_stage": 3, "offload_weights": True})
    )
    others.append(lora := ("--use_peft true", {"lora_r": s.lora_r or LORA["lora_r"]}))
    tried = [[change] for change in lighter + others] + [lighter] + [[*lighter, change] for change in others]
    tried.append([*lighter, lora, ("--load_in_4bit true", {"four_bit": True})])
    fitting: list[tuple[set, str]] = []
    for chosen in tried:
        flags, candidate = [], s
        for flag, change in chosen:
            if (changed := replace(candidate, **change)) != candidate:
                flags.append(flag)
                candidate = changed
        if not flags or any(simpler <= set(flags) for simpler, _ in fitting):
            continue
        if (new := estimate(config, candidate)).fits(device_bytes):
            host = f", and {new.host / GIB:.0f} GiB of the CPU's memory per process" if new.host else ""
            fitting.append((set(flags), f"{' '.join(flags)}: {new.total / GIB:.1f} GiB{host}"))
    remedies = "\n  ".join(text for _, text in fitting) or "nothing that this program has: take larger devices, or more"
    raise ValueError(
        f"this run does not fit its devices of {device_bytes / GIB:.1f} GiB, of which {RESERVED:.0%} stay free.\n"
        f"{found.line()}\nWhat would fit:\n  {remedies}"
    )


@lru_cache
def _measure_policy_pass(config: str, s: Settings) -> tuple[dict[str, int], int]:
    """(what `build` says of the sizes; bytes of the pass beside weights and gradients)."""
    model, sizes = build(config, s)
    with without_storage() as memory:
        place(model, "cpu")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        memory.peak = held = memory.live
        policy_pass(model, longest_questions(model, s), s)
    return sizes, memory.peak - held


@lru_cache
def _measure_rollout(config: str, s: Settings) -> int:
    """Bytes of a rollout beside the model's weights."""
    model, _ = build(config, s)
    with without_storage() as memory:
        place(model, "cpu")
        memory.peak = held = memory.live
        roll_out(model, longest_questions(model, s), s)
    return memory.peak - held


def build(config: str, s: Settings) -> tuple[nn.Module, dict[str, int]]:
    """The model as the trainer has it, on the meta device, and its sizes; `config` is its configuration as JSON."""
    values = json.loads(config)
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values), dtype=s.dtype
        )
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    base = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if s.four_bit:  # all linear layers but the head
        linear = [m.weight for m in model.modules() if type(m) is nn.Linear and m is not model.get_output_embeddings()]
        base += sum(int(weight.numel() * BYTES_OF_4_BIT) - weight.nbytes for weight in linear)
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


def longest_questions(model: nn.Module, s: Settings) -> Batch:
    """The longest questions (N, P) with the longest clips, on the model's device."""
    device, audio, samples = model.device, model.config.audio_config, round(s.seconds * SAMPLE_RATE)
    frames = -(-samples // 160)
    ids = torch.ones(s.questions, s.prompt, dtype=torch.long, device=device)
    ids[:, : count_audio_tokens(samples)] = audio_token_id(base_model(model))
    width = needed_frames(frames, 2 * audio.max_source_positions)
    features = torch.zeros(s.questions, audio.num_mel_bins, width, device=device)
    return Batch(ids, torch.ones_like(ids), features, torch.full((s.questions,), frames, device=device))


def policy_pass(model: nn.Module, batch: Batch, s: Settings) -> None:
    """Log-probs of N x G completions of the full length, and their gradients."""
    ids = batch.input_ids.new_ones(len(batch), s.generations, s.completion)
    packed = pack(batch.input_ids, batch.attention_mask, ids, torch.ones_like(ids))
    with torch.autocast("cpu", torch.bfloat16) if s.autocast else nullcontext():
        output = score(model, base_model(model), packed, batch.audio_inputs)
    unpack(output.log_probs, packed, s.generations, s.completion).sum().backward()


@torch.no_grad()
def roll_out(model: nn.Module, batch: Batch, s: Settings) -> None:
    """The prefill of N questions, and the last decoding step of their N x G completions."""
    with torch.autocast("cpu", torch.bfloat16) if s.autocast else nullcontext():
        _, cache = prefill(base_model(model), batch)
        cache.crop(-1)
        cache.batch_repeat_interleave(s.generations)
        for layer in cache.layers:
            layer.keys = nn.functional.pad(layer.keys, (0, 0, 0, s.completion - 1))
            layer.values = nn.functional.pad(layer.values, (0, 0, 0, s.completion - 1))
        ids = batch.input_ids[:, -1:].repeat_interleave(s.generations, dim=0)
        mask = ids.new_ones(len(ids), s.prompt + s.completion - 1)
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        logits[:, -1].float().softmax(dim=-1)  # (N * G, V)


def main() -> None:
    parser = ArgumentParser(description="Print, for a model's configuration, which settings fit which GPUs.")
    parser.add_argument("model", nargs="?", default="Qwen/Qwen2-Audio-7B-Instruct", help="folder or hub name")
    parser.add_argument("--prompt", type=at_least(1), default=400, help="tokens of the longest prompt")
    parser.add_argument("--seconds", type=float, default=10, help="of the longest clip")
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
    print("| settings | " + " | ".join(f"{name}, CPU's" for name in ("1 device", "8 devices")) + " |")
    print("| --- | --- | --- |")
    for flags, change in ROWS:
        cells = []
        for processes in (1, 8):
            settings = Settings(processes=processes, prompt=args.prompt, seconds=args.seconds)
            found = estimate(config, replace(settings, **{"steps_per_generation": 16 // processes} | change))
            fits = next((f" fits {size} GB" for size in (24, 48, 80) if found.fits(size * GIB)), "")
            cells.append(f"{found.total / GIB:.1f}{fits}, {found.host / GIB:.0f}")
        print(f"| {flags} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
