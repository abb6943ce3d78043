"""Questions -> batches -> completions: clips checked, questions in batches of like length, decoded ahead by workers.

Leaves out which models are asked (`sweep.py`), files (`results.py`), wording (`dataset/prompt.py`) and the decoding of
tokens (`model/generation.py`).
"""

import hashlib
import os
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from dataset.audio import SAMPLE_RATE, DataError, load_audio
from dataset.encode import (
    check_clip_length,
    check_no_special_token,
    count_audio_tokens,
    count_text_tokens,
    encode_question,
    join,
)
from dataset.prompt import build_question, extract_answer
from dataset.questions import Question
from evaluation.mmau import string_match
from model.generation import MAX_NEW_TOKENS, Sampler, generate, single_thread
from model.qwen2_audio import end_ids

KEPT_SAMPLES = 300_000_000  # decoded audio held in memory by a process, 1.2 GB: all of test-mini's 10 s clips, and more
AUDIO = ("real", "silent", "shuffled")


@dataclass(frozen=True)
class Settings:
    """What decides the answers, beside model and questions."""

    style: str | None  # prompt style; None: the checkpoint's own
    audio: str = "real"  # or `silent`: zeros of the clip's length; or `shuffled`: another question's clip
    channels: str = "first"  # see `load_audio`
    max_new_tokens: int = MAX_NEW_TOKENS
    sample_seed: int | None = None  # greedy if None


def default_workers(device: str) -> int:
    """Worker processes for each process of the run: those that a GPU leaves idle, or one beside a model on the CPU."""
    return max(1, min(8, cores_of_process() - 1)) if device == "cuda" else 1


def cores_of_process() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Clips(Dataset):
    """Paths -> decoded clips, or a text that says why one cannot be used."""

    def __init__(self, paths: list[str], channels: str):
        self.paths, self.channels = paths, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            return load_audio(self.paths[index], self.channels)
        except (DataError, OSError) as error:
            return str(error)


def check_clips(
    paths: list[str], workers: int, channels: str = "first"
) -> tuple[dict[str, int | str], dict[str, np.ndarray]]:
    """Decode every clip once, in `workers` processes.

    Returns:
        Path -> samples at 16 kHz, or what is wrong with the clip; and path -> clip for as many as `KEPT_SAMPLES` allow,
        so that a sweep need not decode them again for every model.
    """
    lengths, kept, room = {}, {}, KEPT_SAMPLES
    loader = DataLoader(Clips(paths, channels), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    for path, clip in zip(paths, loader, strict=True):
        lengths[path] = clip if isinstance(clip, str) else len(clip)
        if not isinstance(clip, str) and len(clip) <= room:
            kept[path] = clip
            room -= len(clip)
    return lengths, kept


def _as_it_is(clip):
    return clip


def swap_clips(paths: list[str]) -> dict[str, str]:
    """Every clip -> another one of them, by the names alone, so that neither order nor machine matters.

    Raises:
        ValueError: there is only one.
    """
    clips = sorted(set(paths), key=lambda path: hashlib.sha256(Path(path).name.encode()).digest())
    if len(clips) < 2:
        raise ValueError("shuffled audio needs at least two clips")
    return dict(zip(clips, clips[1:] + clips[:1], strict=True))


class EncodedQuestions(Dataset):
    """Questions as the model's inputs, decoded and encoded one by one: rounding must not depend on the neighbours."""

    def __init__(
        self,
        questions: list[Question],
        processor: ProcessorMixin,
        settings: Settings,
        decoded: dict[str, np.ndarray] | None = None,  # path -> clip, of those decoded before
    ):
        self.questions, self.processor, self.settings, self.decoded = questions, processor, settings, decoded or {}
        self.window = processor.feature_extractor.n_samples
        self.swapped = {}
        if settings.audio == "shuffled":
            self.swapped = swap_clips([question.audio_path for question in questions])

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def window_seconds(self) -> float:
        return self.window / SAMPLE_RATE

    def without(self, ids: Container[str]) -> "EncodedQuestions":
        """The other questions."""
        kept = [question for question in self.questions if question.id not in ids]
        return EncodedQuestions(kept, self.processor, self.settings, self.decoded)

    def audio_path(self, index: int) -> str:
        path = self.questions[index].audio_path
        return self.swapped.get(path, path)

    def text(self, index: int) -> str:
        record = self.questions[index].record
        return build_question(record["question"], record["choices"], self.settings.style)

    def __getitem__(self, index: int) -> BatchFeature:
        path = self.audio_path(index)
        clip = self.decoded[path] if path in self.decoded else load_audio(path, self.settings.channels)
        clip = clip[: self.window]  # cut, as the original did
        if self.settings.audio == "silent":
            clip = np.zeros_like(clip)
        with single_thread():
            return encode_question(self.processor, self.text(index), clip)


def find_unusable(questions: EncodedQuestions, samples: dict[str, int | str]) -> dict[str, str]:
    """Id -> what keeps a question from being asked: a clip that cannot be used, or a special token in its text."""
    problems = {}
    for index, question in enumerate(questions.questions):
        length = samples[question.audio_path]
        try:
            if isinstance(length, str):
                raise DataError(length)
            check_clip_length(min(length, questions.window), questions.processor)
            check_no_special_token(questions.text(index), questions.processor)
        except DataError as error:
            problems[question.id] = str(error)
    return problems


def make_batches(questions: EncodedQuestions, samples: dict[str, int], batch_size: int) -> list[list[int]]:
    """Indices of all questions in batches of like prompt length, longest first, the same for any order of the rows."""
    text_tokens = count_text_tokens(questions.processor, [questions.text(index) for index in range(len(questions))])
    hop = questions.processor.feature_extractor.hop_length

    def length(index: int) -> int:
        heard = min(samples[questions.audio_path(index)], questions.window)
        return text_tokens[index] + count_audio_tokens(heard, hop)

    order = sorted(range(len(questions)), key=lambda index: (-length(index), questions.questions[index].id))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_batches(
    model: PreTrainedModel,
    questions: EncodedQuestions,
    batches: list[list[int]],
    workers: int,
    write: Callable[[dict[str, str]], None],
    title: str,
    quiet: bool = False,
) -> None:
    """Ask the questions of `batches`; hand each batch's {id: completion} to `write` as soon as it is there.

    Args:
        workers: processes that decode clips ahead; 0 decodes in line.
        title: of the progress bar, which shows questions/s and the accuracy so far (in %).
        quiet: show no bar.
    """
    tokenizer = questions.processor.tokenizer
    ends = end_ids(questions.processor)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    loader = DataLoader(
        questions,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(join, pad_id=pad_id),
        pin_memory=model.device.type == "cuda",
    )
    right = answered = 0
    interval = 0.1 if sys.stderr.isatty() else 30
    total = sum(map(len, batches))
    with tqdm(total=total, desc=title, unit=" questions", disable=quiet, mininterval=interval, maxinterval=60) as bar:
        for indices, batch in zip(batches, loader, strict=True):
            batch = batch.to(model.device)
            asked = [questions.questions[index] for index in indices]
            seed, choose = questions.settings.sample_seed, None
            if seed is not None:
                choose = Sampler(model, batch, [question.id for question in asked], seed)
            ids = generate(model, batch, ends, questions.settings.max_new_tokens, choose)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            write({question.id: text for question, text in zip(asked, texts, strict=True)})
            for question, text in zip(asked, texts, strict=True):
                if answer := question.record.get("answer"):
                    right += string_match(answer, extract_answer(text), question.record["choices"])
                    answered += 1
            if answered:
                bar.set_postfix_str(f"accuracy {100 * right / answered:.1f}%", refresh=False)
            bar.update(len(indices))
