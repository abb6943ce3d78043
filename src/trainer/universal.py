"""A DeepSpeed run that goes on with another number of processes, through DeepSpeed's universal checkpoint.

ZeRO cuts the optimizer's state in as many parts as there are processes. The converted state holds it by parameters.
"""

import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from evaluation.sweep import together

from .resume import PARTIAL, describe_newest
from .stopping import RunEnded


def count_parts(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint's DeepSpeed state, each its own part of it."""
    return len(list(checkpoint.glob("global_step*/*_optim_states.pt")))


def load_other_parts(trainer: Trainer, checkpoint: Path) -> None:
    """Load a checkpoint's DeepSpeed state that another number of processes wrote into an engine that is ready.

    Raises:
        RunEnded: in all processes, if it cannot be converted for want of room.
    """
    engine = trainer.model_wrapped
    with _converted(checkpoint, Path(trainer.args.output_dir) / PARTIAL / "universal") as folder:
        engine._config.load_universal_checkpoint = True  # asked for at every load
        try:
            deepspeed_load_checkpoint(engine, str(folder))
        finally:
            engine._config.load_universal_checkpoint = False


@contextmanager
def _converted(checkpoint: Path, folder: Path) -> Iterator[Path]:
    """`folder` with the converted state while the context lasts: the first process writes it, then removes it."""
    try:
        together(lambda: convert(checkpoint, folder), main=True)
        yield folder
        together(lambda: None)  # all have read it
    except OSError as error:
        last = describe_newest(checkpoint.parent)
        raise RunEnded(f"{checkpoint}: its state cannot be converted ({error}). {last}", True) from error
    finally:
        together(lambda: shutil.rmtree(folder, ignore_errors=True), main=True)


def convert(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's DeepSpeed state as a universal one; the checkpoint stays as it is.

    Raises:
        OSError: there is no room for it, or it cannot be written.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    source = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # The parts of each parameter lie beside the whole until all are put together.
    needed, free = 2 * sum(path.stat().st_size for path in source.iterdir()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free in {folder.parent}")
    print(f"{checkpoint}: {count_parts(checkpoint)} processes wrote its state; it is converted", flush=True)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main(
            Namespace(
                input_folder=str(source), output_folder=str(folder / source.name), keep_temp_folder=False, strict=True,
                inject_missing_state=True,  # transformers' models do not say that there is no tensor parallelism
                num_extract_workers=1, num_merge_workers=1,  # in this process, where `execute_nothing` holds
            )
        )  # fmt: skip
