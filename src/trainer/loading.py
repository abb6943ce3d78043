"""The next questions' clips, decoded and encoded by processes of the loader while a step computes
(`--dataloader_num_workers`), for both trainers: how such a process behaves, and how long steps wait for it. For GRPO
also what a batch is: TRL's loader hands out a question's row G times, and again for every pass over its rollouts.

Shapes: N questions, G generations.
"""

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import ProcessorMixin
from trl.trainer.utils import RepeatSampler

from dataset.encode import Batch, encode, load_or_replace
from evaluation.answers import end_with_parent


class LoadsAhead:
    """Mixin, to stand before the trainer class. Logs `data_time`, the seconds a step waited for its batch."""

    _waited, _batches = 0.0, 0  # since the last log
    _iterators: dict[int, Any] = {}  # the newest of each of torch's loaders

    def train(self, *args, **kwargs):
        """As usual; then ends the loader's processes. Left to the garbage collector, which takes the queues apart
        before the iterator, they are never told."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for iterator in self._iterators.values():
                if hasattr(iterator, "_shutdown_workers"):  # one without processes has none
                    iterator._shutdown_workers()

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        base = loader.base_dataloader  # below accelerate's
        base.worker_init_fn = partial(begin_worker, base.worker_init_fn)
        make, number = base._get_iterator, len(self._iterators)
        self._iterators = self._iterators | {number: None}

        def keep():
            self._iterators[number] = iterator = make()
            return iterator

        base._get_iterator = keep
        atexit.register(end_workers)
        return loader

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self._waited, self._batches = self._waited + time.perf_counter() - start, self._batches + 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._batches and not any(key.startswith("eval_") for key in logs):
            logs["data_time"] = round(self._waited / self._batches, 4)
            self._waited, self._batches = 0.0, 0
        super().log(logs, start_time)


def begin_worker(usual: Callable[[int], None] | None, worker: int) -> None:
    """What a loader's process does first. Signals are its parent's to answer, who finishes a step and saves: a group of
    processes gets them all, and what a fork inherits would tell the parent of a second one. It ends with its parent."""
    end_with_parent(worker)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or tokenizers warn of the fork
    if usual:
        usual(worker)


def end_workers() -> None:
    """What this process does at its end, if a traceback still keeps a loader: multiprocessing would end the loader's
    processes by SIGTERM, which they ignore, and wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch would complain of their end
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@dataclass
class Questions:
    """N questions, those of GRPO's generation batch or of a supervised step."""

    rows: list[dict]
    clips: list[np.ndarray]  # float32 (samples,) at 16 kHz
    batch: Batch  # on the CPU
    replaced: int  # rows whose clip could not be used


def load_questions(
    rows: list[dict], audio_channels: str, processor: ProcessorMixin, others: Dataset | None = None
) -> Questions:
    """N rows of `load_train_dataset`, their clips decoded and encoded; with `others`, and raises, as
    `load_or_replace`."""
    loaded = [load_or_replace(row, audio_channels, processor, others) for row in rows]
    usable, clips, replaced = map(list, zip(*loaded, strict=True))
    batch = encode(processor, [row["prompt"] for row in usable], clips)
    return Questions(usable, clips, batch, sum(replaced))


@dataclass
class QuestionLoader:
    """Rows of `load_train_dataset` -> questions, as `load_or_replace` has them."""

    processor: ProcessorMixin  # the model's
    audio_channels: str
    generations: int
    others: Dataset  # that stand in for rows whose clips cannot be used

    def load(self, rows: list[dict], replace: bool = True) -> Questions:
        return load_questions(rows, self.audio_channels, self.processor, self.others if replace else None)

    def __call__(self, items: list) -> list[dict]:
        """The N * G rows of a batch of `MarkedRows`; the first has their `Questions` if rollouts are to be made. Rows
        of other data sets, which are TRL's to evaluate, stay as they are."""
        if isinstance(items[0], dict):
            return items
        rows = [row for row, _ in items]
        if not items[0][1]:
            rows[0] = rows[0] | {"questions": self.load(rows[:: self.generations])}
        return rows


@dataclass
class MarkedRows:
    """A data set for a loader: (row, whether `QuestionOrder` has marked it)."""

    rows: Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[dict, bool]:
        return self.rows[int(index)], isinstance(index, Again)


class Again(int):
    """A question's index in a further pass over its rollouts, for which its clip is not needed."""


class QuestionOrder(RepeatSampler):
    """TRL's order of questions in the first epoch; that of a later one needs no earlier ones to be drawn before.
    Passes after the first over a generation batch are marked."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        rows = self.batch_size * self.mini_repeat_count
        for place, index in enumerate(super().__iter__()):
            yield Again(index) if place // rows % self.repeat_count else index
