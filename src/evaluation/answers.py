"""Questions -> batches -> completions. All processes make the same batches, and each answers its share of them. Threads
decode and encode a batch while the model answers the previous one. `decoding.py` chooses the tokens."""

from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel

from dataset.audio import load_audio
from dataset.encode import count_audio_tokens, encode_question, join
from dataset.prompt import DEFAULT_STYLE, build_question
from dataset.questions import Question
from dataset.rows import DataError
from model.generation import generate
from model.qwen2_audio import check_audio_token, end_ids

from .clips import count_threads, swap_clips
from .decoding import Greedy, Sampler, single_thread
from .lengths import check_prompt, count_text_tokens
from .results import Completion, Settings


class EncodedQuestions:
    """Questions as the model's inputs. Each is encoded alone, since rounding must not depend on the batch. `samples` is
    the length of the clip at every path, at 16 kHz, or why it does not decode (`measure_clips`)."""

    def __init__(self, questions: list[Question], samples: dict[str, int | str], processor: Any, run: Settings):
        self.questions, self.samples, self.processor, self.run = questions, samples, processor, run
        self.window = processor.feature_extractor.n_samples
        self.swapped = swap_clips([question.audio_path for question in questions]) if run.audio == "shuffled" else {}

    def encode(self, index: int) -> BatchFeature:
        """The model's inputs for one question, its clip cut to the model's window as in the original."""
        with single_thread():
            clip = load_audio(self.clip_path(index), self.run.channels)[: self.window]
            heard = np.zeros_like(clip) if self.run.audio == "silent" else clip
            return encode_question(self.processor, self.text(index), heard)

    def clip_path(self, index: int) -> str:
        path = self.questions[index].audio_path
        return self.swapped.get(path, path)

    def text(self, index: int) -> str:
        record = self.questions[index].record
        return build_question(record["question"], record["choices"], self.run.style or DEFAULT_STYLE)

    def names(self, indices: list[int]) -> list[str]:
        return [self.questions[index].id for index in indices]

    @cached_property
    def text_tokens(self) -> list[int]:
        """Tokens of each prompt, without those of its clip."""
        return count_text_tokens(self.processor, [self.text(index) for index in range(len(self.questions))])

    def find_unusable(self) -> dict[str, str]:
        """Id -> why a question cannot be asked: an unusable clip or text, or too long a prompt."""
        problems = {}
        for index, question in enumerate(self.questions):
            samples, longest = self.samples[question.audio_path], self.processor.tokenizer.model_max_length
            try:
                if isinstance(samples, str):
                    raise DataError(samples)
                samples = min(samples, self.window)
                check_prompt(self.text(index), samples, self.text_tokens[index], self.processor, longest)
            except DataError as error:
                problems[question.id] = f"{question.id}: {error}"
        return problems

    def without(self, ids: Container[str]) -> "EncodedQuestions":
        kept = [question for question in self.questions if question.id not in ids]
        return EncodedQuestions(kept, self.samples, self.processor, self.run)

    def batches(self) -> list[list[int]]:
        """Indices of all questions, batched by prompt length, longest first, the same for any order of rows."""
        hop, size = self.processor.feature_extractor.hop_length, self.run.batch_size
        samples = [min(self.samples[self.clip_path(index)], self.window) for index in range(len(self.questions))]
        lengths = [text + count_audio_tokens(clip, hop) for text, clip in zip(self.text_tokens, samples, strict=True)]
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], self.questions[index].id))
        return [order[start : start + size] for start in range(0, len(order), size)]


def answer_batches(
    model: PreTrainedModel, questions: EncodedQuestions, batches: list[list[int]], write: Callable, title: str | None
) -> None:
    """Answer this process's share of `batches`, greedily or as `sample_seed` says, and pass each batch's {id:
    completion} to `write` at once. The first process shows a progress bar with the title, if any. Raises a `ValueError`
    if model and processor have different audio tokens, and a `DataError` if a clip can no longer be decoded."""
    check_audio_token(model, questions.processor)
    state, tokenizer, ends = PartialState(), questions.processor.tokenizer, end_ids(questions.processor)
    own, seed = batches[state.process_index :: state.num_processes], questions.run.sample_seed
    hidden = title is None or not state.is_main_process or None  # None hides the bar if stderr is no terminal
    bar = tqdm(total=sum(map(len, own)), desc=title, unit=" questions", disable=hidden)
    with ThreadPoolExecutor(count_threads()) as pool, bar:
        ahead = [pool.map(questions.encode, indices) for indices in own[:1]]
        for indices, following in zip(own, [*own[1:], []], strict=False):  # `own` may be empty
            batch, names = join(list(ahead.pop()), tokenizer.pad_token_id), questions.names(indices)
            ahead.append(pool.map(questions.encode, following))
            batch = batch.to(model.device)
            choose = Greedy(model, batch) if seed is None else Sampler(model, batch, names, seed)
            ids = generate(model, batch, ends, questions.run.max_new_tokens, choose)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            write(dict(zip(names, map(Completion, texts, [tokens[-1] not in ends for tokens in ids]), strict=True)))
            bar.update(len(indices))
