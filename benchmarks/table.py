"""The records that `gpu.sh` left in a folder, as Markdown for docs/LOG.md: python benchmarks/table.py FOLDER"""

import argparse
import json
from pathlib import Path

from floor import PHASES


def to_table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def describe(record: dict) -> str:
    """Where it was measured, and that a CPU is no GPU."""
    machine = record["machine"]
    return f"{machine['device']}, torch {machine['torch']}" + ("" if machine["gpu"] else "; **not run on a GPU**")


def to_step(record: dict) -> list[str]:
    """Phases in rows, the ways side by side: seconds, and the share of the floor that was reached."""
    s, ways = record["settings"], record["ways"]
    lines = [
        f"`step_time.py`, {s['size']}, {record['parameters']:,} parameters, "
        f"{'LoRA' if s['lora'] else 'all weights'}{', checkpointing' if s['checkpointing'] else ''}, "
        f"{s['dtype'].removeprefix('torch.')}: {s['questions']} questions x {s['generations']} completions of "
        f"{s['completion']} tokens, prompts of {s['prompt']} tokens, rollouts: {s['engine']}, 1/{s['processes']} of "
        "the optimizer; "
        f"{describe(record)}. Measured there: {record['rates']['operations'] / 1e12:.3g} Top/s, "
        f"{record['rates']['bytes'] / 1e9:.3g} GB/s. In brackets the share of the floor that was reached.",
        "",
    ]
    rows = []
    for phase in (*PHASES, "other"):
        cells = []
        for way in ways.values():
            seconds, floor = way["seconds"][phase], way["floor"].get(phase)
            cells.append(f"{seconds:.4f}" + (f" ({floor / seconds:.0%})" if floor and seconds else ""))
        rows.append([phase, *cells])
    for name, key, form in (("a step, s", "step", "{:.3f}"), ("the host waits", "host_waits", "{}")):
        rows.append([name, *(form.format(way[key]) for way in ways.values())])
    rows.append(["matrix operations, T", *(f"{sum(way['operations'].values()) / 1e12:.3g}" for way in ways.values())])
    rows.append(["memory at most, GiB", *(f"{way['peak_bytes'] / 2**30:.2f}" for way in ways.values())])
    return lines + to_table(["s", *ways], rows)


def to_checks(record: dict) -> list[str]:
    lines = [f"`correctness.py`, {record['settings']['size']}; {describe(record)}.", ""]
    rows = [
        [check["what"], f"{check['found']:.2g}", f"{check['limit']:.2g}", "ok" if check["ok"] else "**FAILED**"]
        for check in record["checks"]
    ]
    return lines + to_table(["", "found", "at most", ""], rows)


def to_evaluation(record: dict) -> list[str]:
    lines = [f"`eval_speed.py`, {record['size']}, {record['dtype'].removeprefix('torch.')}; {describe(record)}.", ""]
    rows = []
    for case in record["cases"]:
        plain, ours = case["seconds"].values()
        rows.append(
            [case["case"], f"{plain:.2f}", f"{ours:.2f}", f"{plain / ours:.2f}", f"{case['questions'] / ours:.2f}"]
        )
    return lines + to_table(["", "plain loop, s", "ours, s", "times as fast", "ours, questions/s"], rows)


PARTS = {"correctness": to_checks, "full": to_step, "lora": to_step, "long-built-in": to_step, "long-vllm": to_step}
PARTS |= {"evaluation": to_evaluation}


def main() -> None:
    parser = argparse.ArgumentParser(description="Records of gpu.sh as Markdown.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, write in PARTS.items():
        file = folder / f"{name}.json"
        print("\n".join(write(json.loads(file.read_text())) if file.is_file() else [f"{name}: not run.", ""]))


if __name__ == "__main__":
    main()
