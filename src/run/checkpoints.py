"""What a run needs to resume: its record in a checkpoint, which checkpoint is whole, and which are kept.

transformers' `Trainer` writes weights, optimizer, schedule and random state. `KeepCheckpoints` then adds `resume.json`,
the last file: the digests of all others, and the settings of the run. A checkpoint without it holds weights only. One
whose files differ from their digests is damaged.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import SchedulerType, rotate_checkpoints

from dataset.rows import read_json
from evaluation.checkpoints import check_whole, label_of
from evaluation.files import hash_file, write_whole
from evaluation.identity import IncompleteCheckpoint

from .signals import RunEnded

RECORD = "resume.json"
STATE = "trainer_state.json"  # stays in every checkpoint: it holds the log
# What transformers and DeepSpeed write to resume: all but weights and processor.
BULK = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "global_step*", "latest", "zero_to_fp32.py")
FREE_SPACE = "Free space, or keep less (--save_total_limit, --keep_optimizer, --save_steps)"
BY_RESULT = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # schedules that depend on an evaluation
# Flags that cannot change what is learned, by their beginnings: everything else is compared when a run resumes.
IGNORED = (
    "output_dir", "logging_", "log_", "save_", "eval_", "do_", "report_to", "run_name", "resume", "force_resume",
    "overwrite_output_dir", "keep_optimizer", "max_skipped", "dataloader_", "ddp_", "local_rank", "use_wandb",
    "per_device_", "gradient_accumulation_steps", "gradient_checkpointing", "activation_checkpointing", "deepspeed",
    "steps_per_generation", "use_cpu", "num_completions_to_print", "disable_tqdm", "push_to_hub", "hub_", "trackio",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "max_dropped", "data_file", "debug",
    "model_name_or_path", "project", "accelerator_config", "remove_unused", "skip_memory_metrics", "include_",
    "batch_eval_metrics", "prediction_loss_only", "num_generations_eval", "vllm_gpu_memory_utilization",
    "vllm_server", "vllm_group_port", "enable_jit_checkpoint", "restore_callback_states",
)  # fmt: skip


def result_settings(parsed: Sequence[Any], reward_files: Sequence[str] = ()) -> dict[str, Any]:
    """All flags of a parsed command line that may change the result, as JSON has them, and the content of the files
    that hold reward functions."""
    flags = {field.name: getattr(part, field.name) for part in parsed for field in fields(part) if field.init}
    kept = {name: value for name, value in flags.items() if not name.startswith(IGNORED)}
    digests = {f"{path} (content)": hash_file(path)[:16] for path in reward_files}
    return json.loads(json.dumps(kept | digests, default=str))


def checkpoints_in(out: Path) -> list[Path]:
    """The folders `checkpoint-STEP`, in the order of their steps."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """300 of `.../checkpoint-300`; for a folder of another name the step in its trainer state."""
    label = label_of(str(checkpoint))
    return int(label) if label.isdecimal() else read_json(checkpoint / STATE, "use another checkpoint")["global_step"]


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if there is no folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def record_state(checkpoint: Path, settings: dict) -> None:
    """Write `resume.json` when all other files are on the disk."""
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in [*paths, checkpoint]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    files = sorted(str(path.relative_to(checkpoint)) for path in paths if path.name != RECORD)
    _write_record(checkpoint, settings, _hash(checkpoint, files))


def update_state(checkpoint: Path, state: TrainerState) -> None:
    """Replace a checkpoint's trainer state after an evaluation; its record then allows the state before, too, so that
    the checkpoint is whole at every moment."""
    partial = checkpoint / f"{STATE}.tmp"
    state.save_to_json(str(partial))
    if (checkpoint / RECORD).is_file():
        record = read_json(checkpoint / RECORD, "use another checkpoint")
        before = hash_file(checkpoint / STATE)
        _write_record(checkpoint, record["settings"], record["files"] | {STATE: f"{before} {hash_file(partial)}"})
    partial.replace(checkpoint / STATE)


def _write_record(checkpoint: Path, settings: dict, files: dict[str, str]) -> None:
    record = {"settings": settings, "files": files, "digest": _digest(settings, files)}
    write_whole(checkpoint / RECORD, json.dumps(record, indent=2) + "\n")


def _digest(settings: dict, files: dict[str, str]) -> str:
    content = json.dumps({"settings": settings, "files": files}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _hash(folder: Path, files: Sequence[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(lambda name: hash_file(folder / name), files), strict=True))


def drop_state(checkpoint: Path) -> None:
    """Reduce a checkpoint to its weights. The record goes first: without it nothing resumes from the rest."""
    (checkpoint / RECORD).unlink(missing_ok=True)
    for path in [path for pattern in BULK for path in checkpoint.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_settings(checkpoint: Path, verify: bool = True) -> dict:
    """The settings that a resumable checkpoint was trained with. With `verify`, all files are read and compared with
    their digests. Raises an `IncompleteCheckpoint` that says why a run cannot resume from it."""
    check_whole(checkpoint)
    if not (checkpoint / RECORD).is_file():
        remedy = f"--model_name_or_path {checkpoint} starts a new run from them"
        raise IncompleteCheckpoint(f"{checkpoint}: holds weights only (see --keep_optimizer); {remedy}")
    try:
        record = read_json(checkpoint / RECORD, "use another checkpoint")
        settings, files = dict(record["settings"]), dict(record["files"])
        if record["digest"] != _digest(settings, files):
            raise ValueError(f"{RECORD} was changed")
        int(read_json(checkpoint / STATE, "use another checkpoint")["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompleteCheckpoint(f"{checkpoint}: {RECORD} or {STATE} is missing or damaged ({error})") from error
    damaged = [name for name in files if not (checkpoint / name).is_file()]
    if verify and not damaged:
        damaged = [name for name, found in _hash(checkpoint, list(files)).items() if found not in files[name]]
    if damaged:
        raise IncompleteCheckpoint(f"{checkpoint}: {damaged[0]} is missing or damaged")
    return settings


def find_newest(out: Path, verify: bool = True) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in a folder that a run can resume from, and why not from newer ones."""
    problems: list[str] = []
    for checkpoint in reversed(checkpoints_in(out)):
        try:
            read_settings(checkpoint, verify)
            return checkpoint, problems
        except IncompleteCheckpoint as error:
            problems.append(str(error))
    return None, problems


def describe_newest(out: Path) -> str:
    """What a run that ends early leaves to resume from, as a sentence."""
    newest, _ = find_newest(out, verify=False)
    return f"--resume continues from {newest.name}" if newest else "There is no checkpoint to resume from"


def choose_start(args: TrainingArguments, settings: dict, restarted: bool) -> Path | None:
    """The checkpoint that a run resumes from, or None for a new one. Nothing is removed. A run that is `restarted` by
    the launcher after a failure resumes if it has a checkpoint. Raises a `ValueError` if there is none to resume from,
    the one asked for is damaged, its settings differ from `settings`, this run's, or the folder holds checkpoints of
    another run."""
    out, start = Path(args.output_dir), None
    if args.resume_from_checkpoint and not (restarted and checkpoints_in(out)):
        start = Path(args.resume_from_checkpoint)
        if not start.is_dir():
            raise ValueError(f"--resume_from_checkpoint {start}: no such folder; --resume takes the newest")
        read_settings(start)  # verifies its files
    elif args.resume or (restarted and checkpoints_in(out)):
        start, problems = find_newest(out)
        if start is None:
            reasons = "".join(f"\n  {problem}" for problem in problems)
            raise ValueError(f"{out}: holds no checkpoint to resume from{reasons or '; omit --resume'}")
        for problem in problems:
            print(f"passed over: {problem}", flush=True)
    if start:
        compare_settings(start, settings, args)
    foreign = [] if args.resume or restarted else foreign_checkpoints(out, start)
    if foreign and not args.overwrite_output_dir:
        raise ValueError(
            f"{out}: holds {', '.join(path.name for path in foreign)} of {'later steps' if start else 'another run'}; "
            "--resume continues it, --overwrite_output_dir true removes them, OUT_DIR names another folder"
        )
    return start


def compare_settings(checkpoint: Path, now: dict, args: TrainingArguments) -> None:
    """Raise a `ValueError` that names what differs from a checkpoint's settings. With `force_resume` only the engine
    counts, whose state no other one can read unless it is converted to DeepSpeed's universal form."""
    before, config = read_settings(checkpoint, verify=False), getattr(args, "hf_deepspeed_config", None)
    converted = config and config.get_value("checkpoint.load_universal", False)
    if before.get("engine") != now.get("engine") and not converted:
        raise ValueError(
            f"{checkpoint}: its optimizer state is that of engine {before.get('engine')}, now {now.get('engine')}. Use "
            "that engine and number of processes (CONFIG, GPU_NUM, NODE_NUM), convert it (docs/TRAINING.md), or start "
            f"a new run from its weights with --model_name_or_path {checkpoint}"
        )
    differing = [name for name in before | now if name != "engine" and before.get(name) != now.get(name)]
    if differing and not args.force_resume:
        listed = "; ".join(f"{name} {before.get(name)}, now {now.get(name)}" for name in differing)
        raise ValueError(
            f"{checkpoint}: was trained with other settings: {listed}. Use those, or resume with --force_resume true"
        )


def foreign_checkpoints(out: Path, start: Path | None) -> list[Path]:
    """The checkpoints in `out` that do not belong to a run that resumes from `start`: later ones, or all of another
    run's."""
    if start is None or start.resolve().parent != out.resolve():
        return checkpoints_in(out)
    return [path for path in checkpoints_in(out) if step_of(path) > step_of(start)]


def remove_checkpoints(checkpoints: list[Path]) -> None:
    """Remove checkpoints and the results of their evaluation, `test_STEP` beside them, for --overwrite_output_dir."""
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint.parent / f"test_{step_of(checkpoint)}", ignore_errors=True)
        shutil.rmtree(checkpoint)


def finish(start: Path, args: TrainingArguments) -> bool:
    """Whether a run has taken all its steps; then its last checkpoint's model is copied to the output folder."""
    state, out = read_json(start / STATE, "use another checkpoint"), Path(args.output_dir)
    if state["global_step"] < (args.max_steps if args.max_steps > 0 else state["max_steps"]):
        return False
    for path in start.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in (RECORD, STATE, *BULK)):
            shutil.copyfile(path, out / path.name)
    print(f"{start}: all steps are taken; {out} holds the model", flush=True)
    return True


class KeepCheckpoints(TrainerCallback):
    """Marks checkpoints that are whole, and removes what the arguments do not ask to keep.

    Rollouts are not saved: where several steps learn from one, a checkpoint waits until it is used up. `settings` are
    recorded in every checkpoint with training state.
    """

    def __init__(self, trainer: Trainer, settings: dict):
        self.trainer, self.settings, self.out = trainer, settings, Path(trainer.args.output_dir)
        # `Trainer` would remove the old checkpoint before the new one has its record.
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        every = getattr(trainer.args, "steps_per_generation", 1) * getattr(trainer, "num_iterations", 1)
        accumulation = trainer.args.gradient_accumulation_steps
        self.span = math.lcm(every, accumulation) // accumulation
        self.waiting = self.stopping = False  # a checkpoint, or the end, until a rollout is used up
        self.writing: Path | None = None  # the checkpoint that is being written
        self.stale: Path | None = None  # the checkpoint whose trainer state lacks an evaluation

    def on_train_begin(self, args, state, control, **kwargs):
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)  # see `forbid_pickles`; the state is loaded
        self._locate_best(state)
        # `Trainer` skips the batches of this epoch, but a new sampler begins with the first epoch's order.
        sampler = kwargs["train_dataloader"].batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        if not hasattr(sampler.sampler, "set_epoch"):
            for _ in range(int(state.epoch or 0)):
                next(iter(sampler.sampler))

    def on_step_end(self, args, state, control, **kwargs):
        self.waiting |= control.should_save
        self.stopping |= control.should_training_stop
        used_up = state.global_step % self.span == 0
        control.should_save, control.should_training_stop = self.waiting and used_up, self.stopping and used_up
        if control.should_save:
            self._check_space(state)
            self.writing = self.out / f"checkpoint-{state.global_step}"
        return control

    def on_save(self, args, state, control, **kwargs):
        self.waiting = False
        checkpoint = self.out / f"checkpoint-{state.global_step}"
        self._locate_best(state)
        self.trainer.accelerator.wait_for_everyone()  # all processes have written
        if args.should_save:
            if not args.save_only_model:
                record_state(checkpoint, self.settings)
            for other in checkpoints_in(self.out) if args.keep_optimizer != "all" else ():
                if other != checkpoint:
                    drop_state(other)
            rotate_checkpoints(str(self.out), self.limit, state.best_model_checkpoint, use_mtime=False)
        self.trainer.accelerator.wait_for_everyone()
        self.writing = None

    def saves_first(self, evaluate):
        """Wrap `Trainer.evaluate`: the step's checkpoint is saved before, since an evaluation takes long and may
        fail."""

        def evaluated(*args, **kwargs):
            trainer = self.trainer
            if trainer.control.should_save and trainer.args.lr_scheduler_type not in BY_RESULT:
                trainer._save_checkpoint(trainer.model, trial=None)
                trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
                trainer.control.should_save = False
                self.stale = self.out / f"checkpoint-{trainer.state.global_step}"
            return evaluate(*args, **kwargs)

        return evaluated

    def on_step_begin(self, args, state, control, **kwargs):
        self._locate_best(state)
        if self.stale and args.should_save:
            update_state(self.stale, state)
        self.stale = None

    on_epoch_end = on_step_begin

    def _locate_best(self, state) -> None:
        """Name the best checkpoint by its step in this run's folder, whatever the folder was called before."""
        if state.best_global_step:
            best = self.out / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _check_space(self, state) -> None:
        """Raise a `RunEnded` where the disk has no room for a checkpoint of the last one's size."""
        earlier = [path for path in checkpoints_in(self.out) if (path / RECORD).is_file()]
        if not earlier:
            return
        needed, free = 1.05 * size_of(earlier[-1]), shutil.disk_usage(self.out).free
        if any(gather_object([needed > free])):
            sizes = f"needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            checkpoint = f"{self.out}/checkpoint-{state.global_step}"
            raise RunEnded(f"{checkpoint}: {sizes}. {describe_newest(self.out)}. {FREE_SPACE}", everywhere=True)

    def explain_failed_write(self, error: Exception) -> RunEnded | None:
        """What ends the run where a checkpoint could not be written; its torn files are removed. None for an error of
        another kind."""
        if self.writing is None:
            return None
        # torch.save raises a RuntimeError that names no cause: the disk tells.
        if isinstance(error, RuntimeError) and shutil.disk_usage(self.out).free > max(size_of(self.writing), 2**24):
            return None
        shutil.rmtree(self.writing, ignore_errors=True)
        return RunEnded(f"{self.writing}: not written ({error}). {describe_newest(self.out)}. {FREE_SPACE}")


def forbid_pickles() -> None:
    """Have `torch.load` build tensors and plain values only, until training begins: DeepSpeed reads its training state,
    which may come from elsewhere, as a pickle that could execute anything.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
