"""Several machines, each with its processes: whether they write to one disk, and that all start from the same.

On a disk that nodes share, the run's first process writes what is the same for all; where each node has a disk of its
own, each node's first process does, so that every node can go on from what it has. On one node all is as it was.
"""

import dataclasses
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainingArguments

from evaluation.sweep import processes, together

from .resume import resumable_steps

T = TypeVar("T")
# Flags that may differ between nodes: paths, whose contents are compared, and what only the first process goes by.
OWN = {
    "output_dir", "data_file", "eval_file", "model_name_or_path", "deepspeed", "resume_from_checkpoint", "local_rank",
    "run_name", "logging_dir", "report_to", "config",
}  # fmt: skip


def node() -> int:
    """This node's number, from 0 on."""
    return int(os.environ.get("GROUP_RANK", 0))


def several_nodes() -> bool:
    """Whether torchrun started processes on more than one."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1


def name_of(node: int, host: str) -> str:
    """A node as messages name it."""
    return f"node {node} ({host})"


def shares_disk(out: Path) -> bool:
    """Whether a folder, made if it is not there, is the same on all nodes: do they see a file of the first one?"""
    if not several_nodes():
        return True
    out.mkdir(parents=True, exist_ok=True)

    def write() -> Path:
        path = out / f".shared-{uuid.uuid4().hex}"  # a new name, of which no node's cache knows that it is not there
        path.touch()
        return path

    written = out / together(write, main=True).name
    seen = gather_object([written.exists()])
    if processes().is_main_process:
        written.unlink()
        if not all(seen):
            print(f"{out}: the nodes do not share its disk; each keeps checkpoints of its own there", flush=True)
    return all(seen)


def use_own_disk(args: TrainingArguments) -> None:
    """Have each node save what it needs to go on; a `ValueError` under ZeRO-3."""
    args.save_on_each_node = True
    if args.deepspeed:
        if args.hf_deepspeed_config.is_zero3():
            raise ValueError(
                f"{args.output_dir}: the nodes do not share its disk, and ZeRO-3 gathers the weights on the first one "
                "alone. --output_dir (OUT_DIR) on a shared disk works, or conf/ds_zero2.json"
            )
        args.hf_deepspeed_config.config.setdefault("checkpoint", {})["use_node_local_storage"] = True


def on_each_disk(compute: Callable[[], T], args: TrainingArguments) -> T:
    """The outcome of `compute()`, called once for each disk that the output folder is on; errors as `together`."""
    outcome = together(lambda: compute() if args.should_save else None)
    found = dict(gather_object([(node(), outcome)] if args.should_save else []))
    return found[node() if args.save_on_each_node else 0]


def steps_on_all_nodes(args: TrainingArguments) -> set[int] | None:
    """The steps of the checkpoints that every node could go on from; None where there is one disk."""
    if not args.save_on_each_node:
        return None
    return set.intersection(*gather_object([resumable_steps(Path(args.output_dir))]))


def check_same_settings(settings: dict, parsed: Sequence, files: dict[str, str | None]) -> None:
    """Raise a `ValueError` that says in which flag or file the nodes differ, with what each of them has.

    Args:
        settings: of this node's first process: what decides a run's result, with digests of files.
        parsed: all that the command line was parsed to.
        files: for the settings that are digests, the flag and the path of what they were taken from.
    """
    if not several_nodes():
        return
    flags = {
        field.name: str(getattr(part, field.name))
        for part in parsed
        for field in dataclasses.fields(part)
        if field.init
    }
    own = {name: value for name, value in (flags | settings).items() if name not in OWN}
    gathered = gather_object([(node(), socket.gethostname(), own)] if int(os.environ["LOCAL_RANK"]) == 0 else [])
    _, first_host, first = gathered[0]
    for other, host, values in gathered[1:]:
        if name := next((name for name in first | values if first.get(name) != values.get(name)), None):
            raise ValueError(
                f"{files.get(name) or f'--{name}'}: {first.get(name)} on {name_of(0, first_host)}, {values.get(name)} "
                f"on {name_of(other, host)}; all nodes must have the same"
            )


def check_same_clips(dataset: Dataset) -> None:
    """Raise a `ValueError` that names the first clip which is missing, or of another size, on one of the nodes."""
    if not several_nodes():
        return

    def size(path: str) -> int | None:
        try:
            return os.stat(path).st_size
        except OSError:
            return None

    first = int(os.environ["LOCAL_RANK"]) == 0
    sizes = [size(path) for path in dataset["audio_path"]] if first else []
    gathered = gather_object([(node(), socket.gethostname(), sizes)] if first else [])
    _, first_host, expected = gathered[0]
    for other, host, found in gathered[1:]:
        differing = [i for i, pair in enumerate(zip(expected, found, strict=True)) if len(set(pair)) > 1]
        if differing:
            here, there = (
                "missing" if number is None else f"{number} bytes"
                for number in (expected[differing[0]], found[differing[0]])
            )
            row = dataset[differing[0]]
            raise ValueError(
                f"{row['audio_path']} (line {row['row']}): {here} on {name_of(0, first_host)}, {there} on "
                f"{name_of(other, host)}; all nodes must have the same clips, and {len(differing)} differ"
            )
