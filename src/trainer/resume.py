"""What a run needs to go on beside a checkpoint's weights: its record, whether it is whole, and from which to go on.

`resume.json` in a checkpoint lists the files of the training state with their sizes, and the settings of the run that
decide its result. A checkpoint without it holds weights only. Leaves out writing the state itself, see `saving.py`.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from transformers import TrainingArguments

from dataset.rows import read_json, write_whole
from model.checkpoints import FINGERPRINTS, IncompleteCheckpoint, check_whole, label_of

RECORD = "resume.json"
STATE = "trainer_state.json"  # stays in every checkpoint: it holds the log
# The rest of what transformers, DeepSpeed and our trainers write to go on from: all but weights and processor.
BULK = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "rollouts*.pt", "global_step*", "latest",
    "zero_to_fp32.py",
)  # fmt: skip
DAMAGED = "remove the checkpoint, and go on from another"
CONVERTED = ("ZeRO-2", "ZeRO-3")  # the engines whose state another number of processes can read
LAUNCH = ".launch"  # in the output folder, of a run that is started again when it fails: by which call of the launcher
PARTIAL = ".partial"  # in the output folder: what is being written, or was when the run was cut off


def checkpoints_in(out: Path) -> list[Path]:
    """The folders `checkpoint-STEP`, in the order of their steps."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """300 of `.../checkpoint-300`; of a whole one under another name, what its state says."""
    label = label_of(str(checkpoint))
    return int(label) if label.isdecimal() else read_json(checkpoint / STATE, DAMAGED)["global_step"]


def _bulk_files(checkpoint: Path) -> Iterator[Path]:
    for pattern in BULK:
        for path in checkpoint.glob(pattern):
            yield from (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def record_state(checkpoint: Path, settings: dict) -> None:
    """Write `resume.json`, the last file of a checkpoint that holds training state."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(_bulk_files(checkpoint))}
    write_whole(checkpoint / RECORD, json.dumps({"settings": settings, "files": sizes}, indent=2) + "\n")


def drop_state(checkpoint: Path) -> None:
    """Leave a checkpoint its weights only. The record goes first: without, nobody goes on from what is left."""
    (checkpoint / RECORD).unlink(missing_ok=True)
    for path in [path for pattern in BULK for path in checkpoint.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check_resumable(checkpoint: Path) -> dict:
    """The settings that a checkpoint was trained with, after it was found whole: as evaluation wants it, and with all
    of its training state; reads headers and sizes only.

    Raises:
        IncompleteCheckpoint: a run cannot go on from it; says why.
    """
    check_whole(checkpoint)
    if not (checkpoint / RECORD).is_file():
        raise IncompleteCheckpoint(
            f"{checkpoint}: holds weights only; --keep_optimizer all keeps in every checkpoint what a run needs to go "
            f"on. --model_name_or_path {checkpoint} starts a new run from its weights"
        )
    try:
        record = read_json(checkpoint / RECORD, DAMAGED)
        settings, sizes = dict(record["settings"]), dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompleteCheckpoint(f"{checkpoint}: incomplete, {RECORD} is damaged ({error})") from error
    try:  # it grows when its step is evaluated
        int(read_json(checkpoint / STATE, DAMAGED)["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompleteCheckpoint(f"{checkpoint}: incomplete, {STATE} is missing or damaged ({error})") from error
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            state = "cut off" if path.is_file() else "missing"
            raise IncompleteCheckpoint(f"{checkpoint}: incomplete, {name} is {state}")
    return settings


def find_newest(out: Path, everywhere: set[int] | None = None) -> Path:
    """The newest checkpoint in a run's folder that it can go on from; newer ones are named, and why not.

    Args:
        everywhere: the steps that all nodes have, if each has a disk of its own.

    Raises:
        ValueError: there is none.
    """
    newest, problems = _look_for_newest(out, everywhere)
    if newest is None:
        reasons = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{out}: holds no checkpoint to go on from{reasons or '; without --resume a new run starts'}")
    for problem in problems:
        print(f"passed over: {problem}", flush=True)
    return newest


def _look_for_newest(out: Path, everywhere: set[int] | None) -> tuple[Path | None, list[str]]:
    problems: list[str] = []
    for checkpoint in reversed(checkpoints_in(out)):
        try:
            check_resumable(checkpoint)
            if everywhere is not None and step_of(checkpoint) not in everywhere:
                raise IncompleteCheckpoint(f"{checkpoint}: another node has none of this step to go on from")
            return checkpoint, problems
        except IncompleteCheckpoint as error:
            problems.append(str(error))
    return None, problems


def resumable_steps(out: Path) -> set[int]:
    """The steps of the checkpoints in `out` that a run can go on from."""
    found = set()
    for checkpoint in checkpoints_in(out):
        with suppress(IncompleteCheckpoint):
            check_resumable(checkpoint)
            found.add(step_of(checkpoint))
    return found


def describe_newest(out: Path) -> str:
    """What a run that ends early leaves to go on from, as a sentence."""
    for checkpoint in reversed(checkpoints_in(out)):
        try:
            check_resumable(checkpoint)
        except IncompleteCheckpoint:
            continue
        return f"The last good checkpoint is {checkpoint}: --resume goes on from it"
    if checkpoints := checkpoints_in(out):
        return f"{checkpoints[-1]} holds the last weights that are saved; there is no checkpoint to resume from"
    return "No checkpoint was saved yet: a new run has to start"


def check_settings(checkpoint: Path, now: dict) -> None:
    """Raise a `ValueError` that names the settings in which a run differs from the one that wrote the checkpoint."""
    before = check_resumable(checkpoint)
    changed = [name for name in before | now if before.get(name) != now.get(name) and name != "engine"]
    differing = [f"{name} {before.get(name)}, now {now.get(name)}" for name in changed]
    if differing:
        raise ValueError(
            f"{checkpoint}: was trained with other settings, which would change the result: {'; '.join(differing)}. "
            "Give those, or go on with --force_resume true"
        )


def check_engine(checkpoint: Path, now: dict, shared: bool = True) -> None:
    """Raise a `ValueError` with what works, where DeepSpeed cannot read a checkpoint's state, since it is of another
    engine, or its parts lie on several disks: `--force_resume` does not help there.

    Args:
        shared: all of the checkpoint is on one disk, so that its state can be cut anew for another number of processes.
    """
    before, engine = check_resumable(checkpoint).get("engine", "none"), now.get("engine", "none")
    stage, stage_now = (name.partition(" on ")[0] for name in (before, engine))
    if before != engine and not (shared and stage == stage_now and stage in CONVERTED):
        raise ValueError(
            f"{checkpoint}: its optimizer state is that of engine {before}, now {engine}. What works: that engine and "
            "number of processes (CONFIG, GPU_NUM, NODE_NUM), or a new run from its weights, "
            f"--model_name_or_path {checkpoint} with another --output_dir. Without DeepSpeed the number may change, "
            f"and with {' or '.join(CONVERTED)} where all nodes share the disk"
        )


def strange_checkpoints(out: Path, start: Path | None) -> list[Path]:
    """The checkpoints in `out` that are not of a run that goes on from `start` (None: a new one): all of another
    folder's, and those of later steps."""
    if start is None or start.resolve().parent != out.resolve():
        return checkpoints_in(out)
    return [path for path in checkpoints_in(out) if step_of(path) > step_of(start)]


def remove_checkpoints(checkpoints: list[Path]) -> None:
    """Remove checkpoints, and the results of their evaluation, `test_STEP` beside them."""
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint.parent / f"test_{step_of(checkpoint)}", ignore_errors=True)
        shutil.rmtree(checkpoint)


def choose_start(args: TrainingArguments, settings: dict, everywhere: set[int] | None = None) -> Path | None:
    """The checkpoint that a run goes on from, or None for a new one. What a cut-off save left is removed.

    Args:
        everywhere: the steps that all nodes could go on from, if each has a disk of its own.

    Raises:
        ValueError: there is none that can be, it is of a run with other settings, or the output folder holds
            checkpoints that would not be this run's.
    """
    out = Path(args.output_dir)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    start, strange = None, []
    if args.resume_from_checkpoint:
        start = Path(args.resume_from_checkpoint)
        if not start.is_dir():
            raise ValueError(f"--resume_from_checkpoint {start}: there is no such folder; --resume takes the newest")
    elif args.resume:
        start = find_newest(out, everywhere)
    if start and getattr(args, "sync_ref_model", False):
        raise ValueError("--sync_ref_model true: such a run cannot go on, since its reference model is not saved")
    if start:
        check_engine(start, settings, shared=not args.save_on_each_node)
    if start and not args.force_resume:
        check_settings(start, settings)
    if args.resume_from_checkpoint or not args.resume:  # what --resume passed over is replaced step by step
        strange = strange_checkpoints(out, start)
    if strange and not args.overwrite_output_dir:
        names = ", ".join(path.name for path in strange)
        raise ValueError(
            f"{out}: holds {names}, which {'are later' if start else 'another run wrote'}; --resume goes on from the "
            "newest, --overwrite_output_dir true removes them, --output_dir (OUT_DIR) names another folder"
        )
    return start


def execute_nothing(engine: bool) -> None:
    """From now on, `torch.load` makes tensors and plain values only in this process, whoever calls it and however.

    The training state that a run goes on from may come from elsewhere. transformers and our trainers read it so anyway;
    DeepSpeed reads its own as a pickle that could execute anything, though it needs but four classes of its own.

    Args:
        engine: whether DeepSpeed trains.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if engine:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def note_launch(out: Path) -> None:
    """Write down, where the launcher would start this run again, that the checkpoints in `out` are now its own."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        write_whole(out / LAUNCH, os.environ["LAUNCH_ID"])


def resume_after_restart(out: Path, everywhere: set[int] | None = None) -> dict:
    """The flags that stand for a run's own when its launcher has started it again after a failure: those of --resume
    if it has written a checkpoint to go on from, else it starts over."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    note = out / LAUNCH
    if not count or not note.is_file() or note.read_text(encoding="utf-8") != os.environ["LAUNCH_ID"]:
        return {}  # the first start came to nothing, so the flags mean what they did
    if _look_for_newest(out, everywhere)[0] is None:
        return {"overwrite_output_dir": True}
    return {"resume": True, "resume_from_checkpoint": None, "overwrite_output_dir": False}


def finish(start: Path, args: TrainingArguments) -> bool:
    """Whether a run has taken all its steps before; then its last checkpoint's model is put into the output folder."""
    state = read_json(start / STATE, DAMAGED)
    if state["global_step"] < (args.max_steps if args.max_steps > 0 else state["max_steps"]):
        return False
    out = Path(args.output_dir)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    copy_model(start, out / PARTIAL)
    move_files(out / PARTIAL, out)
    print(f"{start}: all steps are taken, the run is finished; {out} holds its model", flush=True)
    return True


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Copy what a checkpoint has beside its training state: weights, configuration, processor, prompt style."""
    state = {RECORD, STATE, FINGERPRINTS, *(path.name for path in _bulk_files(checkpoint))}
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in state:
            shutil.copyfile(path, folder / path.name)


def move_files(source: Path, folder: Path) -> None:
    """Move files that are whole into a folder, over those of the same names, and remove the one that they were in."""
    for path in sorted(source.iterdir()):
        path.replace(folder / path.name)
    source.rmdir()
