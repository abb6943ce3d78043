"""Whether a run fits its devices, before its model is loaded; and what would take less.

    python src/trainer/fitting.py [MODEL]    prints the table of docs/MEMORY.md, from MODEL's configuration alone

Leaves out how the figures come about (`memory.py`), and trying it on the device itself (`probe.py`).
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
import torch
from command_line import ArgumentParser, at_least
from transformers import AutoConfig, PreTrainedConfig, TrainingArguments
from trl import ModelConfig

from trainer.memory import RESERVED, Estimate, Settings, estimate

MIB, GIB = 2**20, 2**30
PARTS = ("weights", "gradients", "optimizer", "reference", "buffers", "rollout", "asking", "activations")

CHECKPOINTING, ONCE = {"checkpointing": True}, {"steps_per_generation": 1}
# A reference that waits on the CPU is a whole model of its own: not one with adapters off, nor ZeRO-3's parts.
WAITING, STAYING = {"ref_offload": True}, {"ref_offload": False}
LORA = STAYING | {"lora_r": 16}
NO_ENGINE = {"zero_stage": 0, "offload_optimizer": False, "offload_weights": False}
ZERO_2, ZERO_3 = (NO_ENGINE | {"zero_stage": stage, "autocast": False} for stage in (2, 3))
ZERO_3 |= STAYING
OFFLOADED, ALL_OFFLOADED = (ZERO | {"offload_optimizer": True} for ZERO in (ZERO_2, ZERO_3 | {"offload_weights": True}))
FOUR_BIT = NO_ENGINE | LORA | {"four_bit": True, "autocast": True, "dtype": torch.bfloat16}
ROWS = (
    ("ds_zero2 (the paper)", ZERO_2),
    ("ds_zero2, checkpointing", ZERO_2 | CHECKPOINTING),
    ("ds_zero2, checkpointing, ref_offload", ZERO_2 | CHECKPOINTING | WAITING),
    ("ds_zero3, checkpointing", ZERO_3 | CHECKPOINTING),
    ("ds_zero2_offload, checkpointing", OFFLOADED | CHECKPOINTING),
    ("ds_zero2_offload, checkpointing, steps_per_generation 1", OFFLOADED | CHECKPOINTING | ONCE),
    ("the same, ref_offload", OFFLOADED | CHECKPOINTING | ONCE | WAITING),
    ("LoRA, ds_zero2", ZERO_2 | LORA),
    ("LoRA, ds_zero2, checkpointing, steps_per_generation 1", ZERO_2 | LORA | CHECKPOINTING | ONCE),
    ("LoRA, 4-bit, no engine", FOUR_BIT),
    ("LoRA, 4-bit, no engine, checkpointing, steps_per_generation 1", FOUR_BIT | CHECKPOINTING | ONCE),
)


def size(count: int) -> str:
    """Bytes as people and GPUs have them: in GiB, or MiB below a tenth of one."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.1f} MiB"


def describe(found: Estimate) -> str:
    """An estimate in a line: the most at one time, and what it is made of."""
    parts = ", ".join(f"{name} {size(value)}" for name in PARTS if (value := getattr(found, name)))
    host = f"; {size(found.host)} of the CPU's memory per process" if found.host else ""
    return f"{size(found.total)} at most ({parts}){host}"


def read_settings(
    args: TrainingArguments, model: ModelConfig, dtype: str | torch.dtype, freeze: Sequence[str],
    config: PreTrainedConfig,
) -> Settings:  # fmt: skip
    """What the flags of a run say of its memory; its longest prompt, clip and answer are the data's.

    Args:
        dtype: of the weights, as `from_pretrained` takes it.
        config: of the model, whose dtype `auto` means.
    """
    generations = getattr(args, "num_generations", 1)
    if args.deepspeed and (args.bf16 or args.fp16):  # the engine converts
        dtype = "bfloat16" if args.bf16 else "float16"
    elif dtype == "auto":
        dtype = config.dtype or torch.float32
    settings = Settings(
        processes=args.world_size,
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        autocast=bool(args.bf16 and not args.deepspeed),
        moments=(0.5 if "8bit" in args.optim else 2) if "adam" in args.optim else 0,
        lora_r=model.lora_r if model.use_peft else 0,
        lora_targets=tuple(model.lora_target_modules),
        four_bit=model.load_in_4bit,
        freeze=tuple(freeze),
        checkpointing=bool(args.activation_checkpointing or args.gradient_checkpointing),
        supervised=not hasattr(args, "num_generations"),
        beta=getattr(args, "beta", 0.0),
        ref_offload=getattr(args, "ref_offload", False),
        generations=generations,
        questions=args.per_device_train_batch_size // generations,
        steps_per_generation=getattr(args, "steps_per_generation", 1),
        completion=getattr(args, "max_completion_length", 0),
        vllm=getattr(args, "use_vllm", False),
    )
    if not args.deepspeed:
        return settings
    read = args.hf_deepspeed_config.get_value
    return replace(
        settings,
        zero_stage=read("zero_optimization.stage", 0) or 1,  # of bfloat16, DeepSpeed divides the optimizer in any case
        offload_optimizer=read("zero_optimization.offload_optimizer.device", "none") != "none",
        offload_weights=read("zero_optimization.offload_param.device", "none") != "none",
    )


def device_of(args: TrainingArguments) -> tuple[str, int]:
    """What this process trains on, and its bytes without those that vLLM's engine holds; processes on a CPU share its
    memory."""
    if args.device.type == "cuda":
        found = torch.cuda.get_device_properties(args.device)
        has_engine = getattr(args, "use_vllm", False) and not args.vllm_enable_sleep_mode
        return found.name, int(found.total_memory * (1 - args.vllm_gpu_memory_utilization if has_engine else 1))
    return "CPU", psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_devices(config: PreTrainedConfig, settings: Settings, devices: list[tuple[str, int]]) -> None:
    """Print a line for each kind of device, what a run takes against what it has.

    A CPU's run is never refused: its memory is shared and swapped, and what is free changes by the moment. What lacks
    only some of the share of a GPU that is kept for things not calculated is not refused either: the probe tries it.

    Raises:
        ValueError: a GPU is too small; names settings that would fit.
    """
    found = estimate(config, settings)
    for name, device_bytes in sorted(set(devices)):
        print(f"memory of {name}, {size(device_bytes)} per process; calculated: {describe(found)}", flush=True)
    gpus = [device_bytes for name, device_bytes in devices if name != "CPU"]
    if gpus and found.total > min(gpus):
        remedies = advise(config, found, min(gpus))
        raise ValueError(f"this run does not fit devices of {size(min(gpus))}: it takes {describe(found)}\n{remedies}")


def advise(config: PreTrainedConfig, found: Estimate, device_bytes: int, than: float = 1.0) -> str:
    """Settings that fit, with `RESERVED` to spare, and take less than `than` times what was `found`: each change alone,
    then with all that only take time; what adds to a change that is enough is left out."""
    fitting: list[tuple[set, str]] = []
    for chosen in _changes(found.settings):
        flags, candidate = [], found.settings
        for flag, change in chosen:
            if (changed := replace(candidate, **change)) != candidate:
                flags += [flag, "--ref_offload false"] if candidate.ref_offload > changed.ref_offload else [flag]
                candidate = changed
        if not flags or any(simpler <= set(flags) for simpler, _ in fitting):
            continue
        new = estimate(config, candidate)
        if new.fits(device_bytes) and new.total < than * found.total:
            host = f", and {size(new.host)} of the CPU's memory per process" if new.host else ""
            fitting.append((set(flags), f"{' '.join(flags)}: {size(new.total)}{host}"))
    remedies = "\n  ".join(text for _, text in fitting) or "nothing that this program has: take larger devices, or more"
    return f"What would fit, with {RESERVED:.0%} to spare:\n  {remedies}"


def _changes(s: Settings) -> list[list[tuple[str, dict]]]:
    """Combinations of changes to try, the simplest first: each as (what to write, what it changes)."""
    lighter: list[tuple[str, dict]] = [("--activation_checkpointing true", CHECKPOINTING)]
    if not s.supervised:
        lighter.append(("--steps_per_generation 1", ONCE))
    if s.questions > 1:
        fewer = {"questions": 1, "steps_per_generation": s.steps_per_generation * s.questions}
        lighter.insert(0, (f"--per_device_train_batch_size {s.generations}", fewer))
    engine: dict = {"dtype": torch.bfloat16}
    lora: tuple[str, dict] = ("--use_peft true", LORA | ({"lora_r": s.lora_r} if s.lora_r else {}))
    others: list[tuple[str, dict]] = []
    if not s.four_bit:  # which is not for engines
        stages: tuple[tuple[str, dict], ...] = (("2", ZERO_2), ("3", ZERO_3)) if s.processes > 1 else ()
        stages = (*stages, ("2_offload", OFFLOADED), ("3_offload", ALL_OFFLOADED))
        others = [(f"CONFIG=conf/ds_zero{stage}.json", engine | change) for stage, change in stages]
    others.append(lora)
    tried = [[change] for change in lighter + others] + [lighter] + [[*lighter, change] for change in others]
    if s.beta and not s.lora_r and not s.supervised:
        waiting: tuple[str, dict] = ("--ref_offload true", WAITING)
        engines: list[list[tuple[str, dict]]] = [[]] * (s.zero_stage < 3)
        engines += [[change] for change in others if change[1].get("zero_stage") == 2]
        tried += [[*base, *change, waiting] for base in ([], lighter) for change in engines]
    four_bit = (f"CONFIG= {lora[0]} --load_in_4bit true", FOUR_BIT | lora[1])
    return [*tried, [four_bit], [*lighter, four_bit]]


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
            fits = next((f" fits {gib} GB" for gib in (24, 48, 80) if found.fits(gib * GIB)), "")
            cells.append(f"{found.total / GIB:.1f}{fits}, {found.host / GIB:.0f}")
        print(f"| {flags} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
