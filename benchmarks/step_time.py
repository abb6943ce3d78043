"""Time of one optimizer step's share of one process, by its phases, against row by row and supervised fine-tuning.

    python benchmarks/step_time.py                                     72 M random weights, on a CPU or the GPU
    python benchmarks/step_time.py --size 7b --checkpointing --json step.json      Qwen2-Audio-7B's shape, made in place

The three contenders (`steps.py`) take turns; seconds are medians. All completions have the full length. The table gives
for each phase its seconds, the matrix operations that it needs, and its floor (`floor.py`): the least time that they
take at the rates of this device, measured just before. The script waits for the device where phases begin and end,
which is not counted among the host's waits; `Trainer`'s logging between steps is not part of a step.
"""

import argparse
import platform
import statistics
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from floor import PHASES, ROW_BY_ROW, SHARED, SUPERVISED, WAYS, count, measure_rates
from steps import ENGINES, SIZES, Phases, Settings, build_contenders, close, count_waits_and_memory, write_record


def measure(settings: Settings, repeats: int) -> dict:
    """The record of a comparison: settings, machine, rates, and for each contender medians of its phases and counts."""
    device = settings.device
    rates = measure_rates(device, settings.dtype)
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        contenders = build_contenders(settings, Path(folder), steps=repeats + 2)
        for contender in contenders.values():  # chooses kernels, makes the optimizer's state
            contender.step(Phases(device))
        watched = {way: count_waits_and_memory(contender, device) for way, contender in contenders.items()}
        for _ in range(repeats):
            for way, contender in contenders.items():
                contender.step(phases := Phases(device))
                taken[way].append(dict(phases.seconds))
        one = contenders[SHARED]
        close(one.trainer)
        config, stepped = one.base.config, one.stepped
        parameters = sum(weight.numel() for weight in one.base.parameters())
    ways = {}
    for way in WAYS:
        work = count(config, settings.shape, way, stepped, settings.dtype.itemsize, settings.lora)
        if way == SHARED and settings.engine != "built-in":  # vLLM's rollout is timed as a whole
            work["decoding"] += work.pop("encoder") + work.pop("prefill")
        totals = [sum(step.values()) for step in taken[way]]
        ways[way] = {
            "step": statistics.median(totals),
            "fastest": min(totals),
            "slowest": max(totals),
            "seconds": {
                name: statistics.median(step.get(name, 0) for step in taken[way]) for name in (*PHASES, "other")
            },
            "operations": {name: part.operations for name, part in work.items()},
            "bytes": {name: part.bytes for name, part in work.items()},
            "floor": {name: rates.seconds(part) for name, part in work.items()},
            "host_waits": watched[way][0],
            "peak_bytes": watched[way][1],
        }
    about = {"settings": describe_settings(settings), "machine": describe_machine(device), "rates": asdict(rates)}
    return about | {"parameters": parameters, "repeats": repeats, "ways": ways}


def describe_settings(settings: Settings) -> dict:
    """The settings as values of JSON."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
    return plain | {"prompt": settings.shape.prompt}


def describe_machine(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "gpu": device.type == "cuda",
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def prefixed(number: float) -> str:
    """A number with three digits and the prefix of its unit.

    >>> prefixed(1_234_000), prefixed(5e14)
    ('1.23 M', '500 T')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number / 1e3:.3g} k"


def to_lines(record: dict) -> list[str]:
    """The record in words and tables."""
    s, machine, rates = (record[key] for key in ("settings", "machine", "rates"))
    trained = "LoRA" if s["lora"] else "all weights"
    lines = [
        f"{s['size']}, {prefixed(record['parameters'])} parameters, {trained}"
        f"{', checkpointing' if s['checkpointing'] else ''}, {s['dtype'].removeprefix('torch.')}, "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        f"{s['questions']} questions x {s['generations']} completions of {s['completion']} tokens, prompts of "
        f"{s['prompt']}, clips of {s['seconds']:g} s; rollouts: {s['engine']}; 1/{s['processes']} of the optimizer",
        f"measured: {prefixed(rates['operations'])}op/s, {prefixed(rates['bytes'])}B/s",
    ]
    for name, way in record["ways"].items():
        floor = sum(way["floor"].values())
        lines += [
            "",
            f"{name}: {way['step']:.3f} s a step ({way['fastest']:.3f} to {way['slowest']:.3f}), "
            f"{prefixed(sum(way['operations'].values()))}op, floor {floor:.3f} s, {floor / way['step']:.0%} reached; "
            f"{prefixed(way['peak_bytes'])}B at most, the host waits {way['host_waits']} times",
            f"  {'phase':<15}{'s':>9}{'operations':>13}{'floor s':>10}{'reached':>9}",
        ]
        for phase, seconds in way["seconds"].items():
            if not seconds and phase not in way["floor"]:
                continue
            line = f"  {phase:<15}{seconds:>9.4f}"
            if phase in way["floor"]:
                least = way["floor"][phase]
                operations = way["operations"][phase]
                line += f"{prefixed(operations) if operations else '':>13}{least:>10.4f}{least / seconds:>9.0%}"
            lines.append(line)
    slow, fast, supervised = (record["ways"][way] for way in (ROW_BY_ROW, SHARED, SUPERVISED))
    fewer = sum(slow["operations"].values()) / sum(fast["operations"].values())
    lines += [
        "",
        f"{SHARED}: {slow['step'] / fast['step']:.2f} times as fast as {ROW_BY_ROW}, with {fewer:.2f} times fewer "
        f"operations; {fast['step'] / supervised['step']:.2f} times the seconds of a supervised step",
    ]
    return lines


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Settings`, which all benchmarks of a step take."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the model, which has random weights")
    parser.add_argument("--questions", type=int, default=2, help="per process and optimizer step; the paper's is 2")
    parser.add_argument("--generations", type=int, default=8, help="completions per question, G")
    parser.add_argument("--seconds", type=float, default=10, help="length of a clip, 0.1 to 30")
    parser.add_argument("--text", type=int, default=60, help="tokens of a prompt beside those of its audio")
    parser.add_argument("--completion", type=int, default=16, help="tokens of each completion, at least 2")
    parser.add_argument("--lora", action="store_true", help="train adapters, as --use_peft true does")
    parser.add_argument("--checkpointing", action="store_true", help="as --activation_checkpointing true")
    parser.add_argument("--engine", choices=list(ENGINES), default="built-in", help="of this project's rollouts")
    parser.add_argument(
        "--processes", type=int, help="that share the optimizer, as under ZeRO; default: 8 for 7b, else 1"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if on_gpu else "cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU and for 7b")
    parser.add_argument("--repeats", type=int, default=3, help="steps of which the median counts")


def to_settings(args: argparse.Namespace) -> Settings:
    values = {field.name: getattr(args, field.name) for field in fields(Settings)}
    big = args.size == "7b"
    values["processes"] = args.processes or (8 if big and not args.lora else 1)
    values["dtype"] = getattr(torch, args.dtype or ("bfloat16" if big or args.device.type == "cuda" else "float32"))
    return Settings(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one optimizer step, by its phases.")
    add_options(parser)
    parser.add_argument("--json", type=Path, help="write the record to this file, too")
    args = parser.parse_args()
    record = measure(to_settings(args), args.repeats)
    print("\n".join(to_lines(record)))
    if args.json:
        write_record(args.json, record)


if __name__ == "__main__":
    main()
