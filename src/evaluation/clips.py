"""A benchmark's clips: their lengths, their hashes, and which clip replaces which in a shuffled run."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from dataset.audio import load_audio
from dataset.questions import Question

from .files import hash_file

T = TypeVar("T")
AUDIO = ("real", "silent", "shuffled")


def count_threads() -> int:
    """The number of cores for each process of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def measure_clips(questions: list[Question], channels: str) -> dict[str, int | str]:
    """Path of every clip -> its length in samples at 16 kHz, or the reason why it cannot be decoded."""
    return _map_clips(lambda path: len(load_audio(path, channels)), str, questions)


def hash_clips(questions: list[Question]) -> dict[str, str]:
    """Path of every clip -> SHA-256 of its file, or `missing`. Takes a tenth of the time of decoding."""

    def hash_clip(path: str) -> str:
        return hash_file(path) if os.path.isfile(path) else "missing"  # reading a device or pipe might never end

    return _map_clips(hash_clip, lambda error: "missing", questions)


def _map_clips(compute: Callable[[str], T], on_error: Callable[[Exception], str], questions: list[Question]) -> dict:
    """Path of every clip -> `compute(path)`. Each process computes its share in threads; all get all results."""

    def attempt(path: str) -> tuple[str, T | str]:
        try:
            return path, compute(path)
        except (ValueError, OSError) as error:
            return path, on_error(error)

    state = PartialState()
    paths = sorted({question.audio_path for question in questions})[state.process_index :: state.num_processes]
    with ThreadPoolExecutor(count_threads()) as pool:
        return dict(gather_object(list(pool.map(attempt, paths))))


def swap_clips(paths: list[str]) -> dict[str, str]:
    """Path of every clip -> another one, by their names alone: the same for any order of rows and on any machine.
    Raises a `ValueError` if there is only one clip."""
    clips = sorted(set(paths), key=lambda path: (hashlib.sha256(Path(path).name.encode()).digest(), path))
    if len(clips) < 2:
        raise ValueError("shuffled audio needs at least two clips; add rows, or omit --hear shuffled")
    return dict(zip(clips, clips[1:] + clips[:1], strict=True))
