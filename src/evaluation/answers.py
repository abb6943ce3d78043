"""Questions -> batches -> completions: clips decoded and checked, questions encoded ahead by worker processes, which on
a CPU answer them, too, if the model is small.

Every process makes the same batches and answers its share of them. Leaves out which models are asked (`sweep.py`),
files (`results.py`), wording (`dataset/prompt.py`) and the decoding of tokens (`model/generation.py`).
"""

import ctypes
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from dataset.audio import load_audio
from dataset.encode import (
    check_clip_length,
    check_no_special_token,
    count_audio_tokens,
    count_text_tokens,
    encode_question,
    join,
)
from dataset.progress import progress
from dataset.prompt import build_question, extract_answer
from dataset.questions import Question
from dataset.rows import DataError, hash_file
from model.generation import Sampler, generate, single_thread
from model.qwen2_audio import check_audio_token, end_ids
from model.vllm_engine import GreedyEngine

from .mmau import string_match
from .results import Completion, Run

T = TypeVar("T")
Completed = tuple[list[int], list[list[int]]]  # indices of questions, and for each the ids of its completion
KEPT_SAMPLES = 300_000_000  # decoded audio held in memory by a process, 1.2 GB: all of test-mini's 10 s clips, and more
SMALL = 30_000_000  # parameters; measured up to there (docs/LOG.md). A larger model keeps all threads of a process busy
SIDE_BY_SIDE = 8  # processes at most, each with a batch in memory
AUDIO = ("real", "silent", "shuffled")
DIES_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG


def default_workers(device: str) -> int:
    """Worker processes for each process of the run: those that a GPU leaves idle, or one beside a model on the CPU."""
    return max(1, min(8, _own_cores() - 1)) if device == "cuda" else 1


def _own_cores() -> int:
    """Cores for each process of the run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@dataclass
class Clips:
    """The clips of a benchmark, by their paths."""

    samples: dict[str, int | str]  # how many at 16 kHz, or what is wrong with the clip
    decoded: dict[str, np.ndarray]  # as many as `KEPT_SAMPLES` allow: a sweep need not decode them for every model


def load_clips(questions: list[Question], channels: str) -> Clips:
    """Decode every clip once; each process keeps those of its share."""
    decoded, room = {}, KEPT_SAMPLES

    def load(path: str) -> int | str:
        nonlocal room
        try:
            clip = load_audio(path, channels)
        except (DataError, OSError) as error:
            return str(error)
        if len(clip) <= room:
            decoded[path] = clip
            room -= len(clip)
        return len(clip)

    return Clips(_of_all_clips(load, questions), decoded)


def hash_clips(questions: list[Question]) -> dict[str, str]:
    """What the file of every clip hashes to: a tenth of the time that decoding takes."""

    def hash_clip(path: str) -> str:
        try:
            return hash_file(path)
        except (OSError, ValueError):
            return "missing"

    return _of_all_clips(hash_clip, questions)


def _of_all_clips(compute: Callable[[str], T], questions: list[Question]) -> dict[str, T]:
    """Every clip's path -> `compute(path)`. Each process takes its share, a thread on each core; all get all."""
    state = PartialState()
    paths = sorted({question.audio_path for question in questions})[state.process_index :: state.num_processes]
    with ThreadPoolExecutor(_own_cores()) as pool:
        return dict(gather_object(list(zip(paths, pool.map(compute, paths), strict=True))))


def _swap_clips(paths: list[str]) -> dict[str, str]:
    """Every clip -> another one of them, by the names alone, so that neither order nor machine matters.

    Raises:
        ValueError: there is only one.
    """
    clips = sorted(set(paths), key=lambda path: (hashlib.sha256(Path(path).name.encode()).digest(), path))
    if len(clips) < 2:
        raise ValueError("shuffled audio needs at least two clips")
    return dict(zip(clips, clips[1:] + clips[:1], strict=True))


class EncodedQuestions(Dataset):
    """Questions as the model's inputs, decoded and encoded one by one: rounding must not depend on the neighbours."""

    def __init__(self, questions: list[Question], clips: Clips, processor: ProcessorMixin, run: Run):
        self.questions, self.clips, self.processor, self.run = questions, clips, processor, run
        self.window = processor.feature_extractor.n_samples
        shuffled = run.audio == "shuffled"
        self.swapped = _swap_clips([question.audio_path for question in questions]) if shuffled else {}

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> BatchFeature:
        clip = self.clip(index)
        with single_thread():
            return encode_question(self.processor, self.text(index), clip)

    def clip(self, index: int) -> np.ndarray:
        path = self.heard_path(index)
        clip = self.clips.decoded[path] if path in self.clips.decoded else load_audio(path, self.run.channels)
        clip = clip[: self.window]  # cut, as the original did
        return np.zeros_like(clip) if self.run.audio == "silent" else clip

    def text(self, index: int) -> str:
        record, style = self.questions[index].record, self.run.style
        assert style is not None, "a sweep has filled it in"
        return build_question(record["question"], record["choices"], style)

    def heard_path(self, index: int) -> str:
        path = self.questions[index].audio_path
        return self.swapped.get(path, path)

    def find_unusable(self) -> dict[str, str]:
        """Id -> what keeps a question from being asked: an unusable clip, or a special token in its text."""
        problems = {}
        for index, question in enumerate(self.questions):
            samples = self.clips.samples[question.audio_path]
            try:
                if isinstance(samples, str):
                    raise DataError(samples)
                check_clip_length(min(samples, self.window), self.processor)
                check_no_special_token(self.text(index), self.processor)
            except DataError as error:
                problems[question.id] = str(error)
        return problems

    def without(self, ids: Container[str]) -> "EncodedQuestions":
        """The other questions."""
        kept = [question for question in self.questions if question.id not in ids]
        return EncodedQuestions(kept, self.clips, self.processor, self.run)

    def count_cut(self) -> int:
        """Questions whose clip is longer than what the model hears."""
        return sum(self.clips.samples[question.audio_path] > self.window for question in self.questions)

    def batches(self) -> list[list[int]]:
        """Indices of all questions in batches of like prompt length, longest first, the same for any order of rows."""
        text_tokens = count_text_tokens(self.processor, [self.text(index) for index in range(len(self))])
        hop = self.processor.feature_extractor.hop_length

        def length(index: int) -> int:
            samples = min(self.clips.samples[self.heard_path(index)], self.window)
            return text_tokens[index] + count_audio_tokens(samples, hop)

        order = sorted(range(len(self)), key=lambda index: (-length(index), self.questions[index].id))
        return [order[start : start + self.run.batch_size] for start in range(0, len(order), self.run.batch_size)]


def answer_batches(
    model: PreTrainedModel | GreedyEngine,
    questions: EncodedQuestions,
    batches: list[list[int]],
    workers: int,
    write: Callable[[dict[str, Completion]], None],
    title: str,
    quiet: bool = False,
) -> None:
    """Ask this process's share of `batches`; hand each batch's {id: completion} to `write` as soon as it is there.

    Args:
        workers: processes that encode questions ahead; 0 encodes in line. A small model on a CPU answers in processes
            of its own instead, unless that is 0: what they hand over comes in any order.
        title: of the first process's progress bar, which shows questions/s and its accuracy so far (in %).
        quiet: show no bar.

    Raises:
        DataError: a clip cannot be decoded any more.
        ValueError: a process that encodes or answers is gone.
    """
    state, tokenizer, ends = PartialState(), questions.processor.tokenizer, end_ids(questions.processor)
    batches = batches[state.process_index :: state.num_processes]
    if isinstance(model, GreedyEngine):
        completed = _complete(model, questions, batches, 0)  # forked beside its threads, workers would wait for ever
    else:
        check_audio_token(model, questions.processor)
        if workers and (processes := _count_side_by_side(model, questions.run)) > 1:
            completed = _complete_side_by_side(model, questions, batches, processes)
        else:
            completed = _complete(model, questions, batches, workers)
    right = answered = 0
    bar = progress(
        total=sum(map(len, batches)),
        desc=title,
        unit=" questions",
        disable=quiet or not state.is_main_process,
    )
    with bar, _explain_loader():
        for indices, ids in completed:
            asked = [questions.questions[index] for index in indices]
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            cut_off = [tokens[-1] not in ends for tokens in ids]
            write({question.id: Completion(*it) for question, *it in zip(asked, texts, cut_off, strict=True)})
            for question, text in zip(asked, texts, strict=True):
                if answer := question.record.get("answer"):
                    right += string_match(answer, extract_answer(text), question.record["choices"])
                    answered += 1
            if answered:
                bar.set_postfix_str(f"accuracy {100 * right / answered:.1f}%", refresh=False)
            bar.update(len(indices))


def _complete(
    model: PreTrainedModel | GreedyEngine, questions: EncodedQuestions, batches: list[list[int]], workers: int
) -> Iterator[Completed]:
    """Batch after batch, `workers` processes encoding ahead."""
    ends, run = end_ids(questions.processor), questions.run
    loader = DataLoader(
        questions,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(join, pad_id=questions.processor.tokenizer.pad_token_id),
        pin_memory=model.device.type == "cuda",
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # a loader draws a seed for its workers: not from the random state of a training
    )
    for indices, batch in zip(batches, loader, strict=True):
        if isinstance(model, GreedyEngine):
            yield indices, model.generate(batch, list(map(questions.clip, indices)), ends, run.max_new_tokens)
            continue
        batch, choose = batch.to(model.device), None
        if run.sample_seed is not None:
            choose = Sampler(model, batch, [questions.questions[index].id for index in indices], run.sample_seed)
        yield indices, generate(model, batch, ends, run.max_new_tokens, choose)


def _count_side_by_side(model: PreTrainedModel, run: Run) -> int:
    """In how many processes the model answers, with a thread each: as many as it has threads, where that is faster (a
    small model on a CPU, whose threads wait for one another), safe (no group of processes) and changes no answer."""
    exact = model.dtype == torch.float32 and run.sample_seed is None
    small = model.device.type == "cpu" and model.num_parameters() <= SMALL
    alone = sys.platform == "linux" and PartialState().num_processes == 1
    return min(torch.get_num_threads(), SIDE_BY_SIDE) if exact and small and alone else 1


def _complete_side_by_side(
    model: PreTrainedModel, questions: EncodedQuestions, batches: list[list[int]], processes: int
) -> Iterator[Completed]:
    """The questions of `batches` in other ones, as they are done by forks of this process, which share the model.

    A loader's processes have one thread each: torch's threads do not survive a fork.
    """
    run, ends, pad_id = questions.run, end_ids(questions.processor), questions.processor.tokenizer.pad_token_id

    def answer(part: list[int]) -> Completed:
        batch = join([questions[index] for index in part], pad_id)
        return part, generate(model, batch, ends, run.max_new_tokens)

    loader: DataLoader[Completed] = DataLoader(
        _cut_evenly(sum(batches, []), processes, run.batch_size),  # type: ignore[arg-type]  # a list will do
        batch_size=None,
        collate_fn=answer,
        num_workers=processes,
        prefetch_factor=1,
        in_order=False,  # a part to each that is free
        multiprocessing_context="fork",
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )
    yield from loader


@contextmanager
def _explain_loader() -> Iterator[None]:
    """Within this context, what befalls a loader's process is said in a sentence.

    Raises:
        DataError: as the process raised it.
        ValueError: a process is gone.
    """
    try:
        yield
    except DataError as error:
        if "in DataLoader worker process" not in str(error):
            raise
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error  # the traceback stands before
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # a mistake in one is "in DataLoader worker process"
            raise
        reason = f"a process beside this one is gone ({str(error).partition('. ')[0]}): out of memory?"
        raise ValueError(f"{reason} The same command goes on; --workers 0 does without such processes") from error


def _cut_evenly(order: list[int], processes: int, largest: int) -> list[list[int]]:
    """Neighbours together, as many parts for each process as it takes for none to be over `largest`."""
    rounds = -(-len(order) // (processes * largest))
    size = -(-len(order) // (processes * max(1, rounds))) or 1
    return [order[start : start + size] for start in range(0, len(order), size)]


def end_with_parent(worker: int) -> None:
    """What a loader's process does first: else, if its parent is killed, it holds the parent's locks, and may wait for
    ever for it to read."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
