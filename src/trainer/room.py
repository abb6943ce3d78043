"""Room on the disk: how large a checkpoint will be, and what a run says that cannot write one.

A save that cannot fit is not begun, since half of one would fill the disk for everybody; one that fails all the same is
removed. Either ends the run: what is on the disk stays, and what was learned since is lost, `save_steps` at most. The
training state of the last whole checkpoint is not given up to make room, though a new one would replace it: until that
is whole, the run has nothing else to go on from.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer

from evaluation.sweep import together

from .resume import describe_newest
from .stopping import RunEnded

MARGIN = 1.05  # processor, configuration, log, random state, rollouts
GB = 1e9
ADAMW = ("adamw_torch", "adamw_torch_fused")  # two moments of a parameter's size
TORCHS_WRITERS = ("inline_container", "iostream", "write(): fd")  # in the words of torch.save's RuntimeErrors
REMEDY = (
    "Make room, or keep less: --save_total_limit N, --keep_optimizer none, --save_steps; then go on with the same "
    "command and --resume"
)


def weight_bytes(trainer: Trainer) -> int:
    """Of the weights that a checkpoint holds: all of a full model, an adapter's own."""
    adapters = isinstance(trainer.model, PeftModel)
    saved = [p for p in trainer.model.parameters() if p.requires_grad or not adapters]
    return sum(_elements(p) * p.element_size() for p in saved)


def state_bytes(trainer: Trainer) -> int:
    """Of what this process adds to go on from; before the first step, as AdamW will have it, or 0 for others."""
    if trainer.args.save_only_model:
        return 0
    main, engine = trainer.accelerator.is_main_process, trainer.is_deepspeed_enabled
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # what accelerate and DeepSpeed wrap around torch's
        optimizer = optimizer.optimizer
    if optimizer is not None and optimizer.state:
        held = [tensor for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]
        if engine:  # float32 weights, too
            held += optimizer.state
        written = sum(tensor.nbytes for tensor in held) if main or engine else 0
    elif trainer.args.optim not in ADAMW:
        written = 0
    else:
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        elements = sum(map(_elements, trained))
        written = 12 * elements // trainer.args.world_size if engine else 2 * sum(p.nbytes for p in trained) * main
    if engine and main and not _is_sharded(trainer):
        written += weight_bytes(trainer)  # the engine saves them beside its optimizer
    return written


def _elements(parameter: torch.nn.Parameter) -> int:
    """Of the whole, where ZeRO-3 has left this process a part."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _is_sharded(trainer: Trainer) -> bool:
    return any(hasattr(parameter, "ds_numel") for parameter in trainer.model.parameters())


def check_room(trainer: Trainer, target: Path, state: bool = True) -> float:
    """The bytes that a checkpoint, or with not `state` a model, will take.

    Args:
        target: what is to be written. The folder it stands in is made anew if it is gone.

    Raises:
        RunEnded: in all processes, if they are not free.
    """
    own = state_bytes(trainer) if state else 0
    needed = MARGIN * (weight_bytes(trainer) + sum(gather_object([own])))

    def free_bytes() -> int:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _free(target)

    try:
        free = together(free_bytes, main=True)
    except OSError as error:
        raise RunEnded(f"{target}: cannot be written ({error}). {describe_newest(target.parent)}", True) from error
    if needed > free:
        raise RunEnded(
            f"{target}: not written, since it needs {needed / GB:.2f} GB and {free / GB:.2f} GB are free there. "
            f"{describe_newest(target.parent)}. {REMEDY}",
            everywhere=True,
        )
    return needed


def foresee_room(trainer: Trainer, step: int) -> None:
    """Say before the first step if a run's checkpoints will not all fit; raise a `RunEnded` if not even one will.

    Args:
        step: the run goes on from; 0 for a new one.
    """
    args, out = trainer.args, Path(trainer.args.output_dir)
    if args.save_strategy == "no":
        return
    check_room(trainer, out / "the first checkpoint")
    weights, state = weight_bytes(trainer), sum(gather_object([state_bytes(trainer)]))
    count = 1
    if args.save_strategy == "steps" and args.max_steps > 0:
        between = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps
        count = math.ceil((args.max_steps - step) / between)
    kept = min(count, args.save_total_limit or count)
    states = kept if getattr(args, "keep_optimizer", "all") == "all" else min(count, 1 if step else 2)
    needed = MARGIN * ((kept + 1) * weights + states * state)
    if trainer.accelerator.is_main_process and needed > (free := shutil.disk_usage(out).free):
        print(
            f"{out}: {kept} checkpoints and the result need {needed / GB:.2f} GB, and {free / GB:.2f} GB are free: the "
            "run ends at the first save that does not fit. --save_total_limit or --save_steps make it fewer",
            flush=True,
        )


def write_together(
    trainer: Trainer, target: Path, partial: Path, needed: float, write: Callable[[], None], waits: bool = False
) -> None:
    """Have every process `write` its part of what is to be `target` below `partial`, and wait for each other.

    Args:
        needed: bytes, as `check_room` has them.
        waits: `write` itself waits for other processes, so that one which failed cannot tell them.

    Raises:
        RunEnded: the disk has refused one. What was written is removed. In all processes, or, if `write` waits, in the
            one alone, whose end is the others' too.
    """
    problem = None
    try:
        with writing(target, partial, needed):
            write()
    except RunEnded as error:
        if waits:
            raise
        problem = str(error)
    if said := next(filter(None, gather_object([problem])), None):
        raise RunEnded(said, everywhere=True)


@contextmanager
def writing(target: Path, partial: Path, needed: float) -> Iterator[None]:
    """See `write_together`, which is this for one process."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(words in str(error) for words in TORCHS_WRITERS):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        try:
            free = (
                f"it needs {needed / GB:.2f} GB, and without its torn parts {_free(target) / GB:.2f} GB are free there"
            )
        except OSError:
            free = "its folder cannot be reached"
        words = "torch.save failed, as it does on a full disk" if type(error) is RuntimeError else str(error)
        reason = getattr(error, "strerror", None) or words
        raise RunEnded(
            f"{target}: not written ({reason}); {free}. {describe_newest(target.parent)}. {REMEDY}"
        ) from error


def _free(target: Path) -> int:
    return shutil.disk_usage(target.parent).free
