"""A clip that cannot be read any more is replaced by another question, drawn at random.

Before training only headers are read, and a disk can fail in hour five.
"""

from zlib import crc32

import torch
from transformers import Trainer

from dataset.audio import load_audio
from dataset.encode import check_clip_length
from dataset.rows import DataError

MOST = 10  # unusable clips in a row, after which the disk is to blame


def replace_broken_clips(trainer: Trainer) -> None:
    """Wrap the trainer's `load`, which raises for an unusable clip. Logs `clips/replaced`, the number so far."""
    load, replaced = trainer.load, 0

    def load_usable(rows: list[dict]):
        nonlocal replaced
        try:
            loaded = load(rows)
        except (ValueError, OSError):
            usable = [_find_usable(row, trainer) for row in rows]
            replaced += sum(row is not old for row, old in zip(usable, rows, strict=True))
            loaded = load(usable)
        if hasattr(trainer, "_metrics"):
            total = trainer.accelerator.reduce(torch.tensor(replaced, device=trainer.args.device))
            trainer._metrics["train"]["clips/replaced"] = [float(total)]
        return loaded

    trainer.load = load_usable


def _find_usable(row: dict, trainer: Trainer) -> dict:
    """The row if its clip can be used, else one of the data set that follows from the broken clip alone: the same on
    every process and in a resumed run. Raises a `DataError` if MOST others are no better."""
    for attempt in range(MOST + 1):
        try:
            check_clip_length(len(load_audio(row["audio_path"], trainer.audio_channels)), trainer.processing_class)
            return row
        except (ValueError, OSError) as error:
            trainer.accelerator.print(f"{error} (another question replaces it)", flush=True)
            chance = torch.Generator().manual_seed(crc32(f"{row['audio_path']} {attempt}".encode()))
            other = int(torch.randint(len(trainer.train_dataset), (), generator=chance))
            row, broken = trainer.train_dataset[other], error
    message = f"{MOST + 1} clips in a row cannot be used, the last one: {broken}. Check the data's disk"
    raise DataError(message, "no usable clip") from broken
