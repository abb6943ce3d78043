"""Supervised fine-tuning on the same questions, prompts and audio as GRPO: the baseline of the paper's title.

transformers' `Trainer` does the training, the mixins accuracy and checkpoints as in GRPO; here are the batches: the
prompt is read, only the answer is learned.

Shapes: N questions, T tokens (prompt and answer), M mel bins, F mel frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import ProcessorMixin, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from dataset.prompt import STYLES, extract_answer
from model.qwen2_audio import base_model, check_audio_token, freeze_parts, needed_frames_only

from .accuracy import GreedyAccuracy
from .finite import FiniteSteps
from .loading import LoadsAhead, load_questions
from .memory import longest_answers, longest_questions
from .probe import MemoryProbe
from .saving import SelfContainedCheckpoints
from .shared_prompt import IGNORE


@dataclass
class AnswerCollator:
    """Rows of `load_train_dataset` -> a batch for supervised fine-tuning."""

    processor: ProcessorMixin  # the model's
    audio_channels: str = "first"  # or `mean`, see `load_audio`
    others: Dataset | None = None  # that stand in for rows whose clips cannot be used

    def target(self, row: dict) -> str:
        """What the model is to write: the right answer in the shape of the row's style, and the end.

        Raises:
            ValueError: the data holds nothing to learn in this style.
        """
        return STYLES[row["style"]].target(extract_answer(row["solution"])) + self.processor.tokenizer.eos_token

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """Decode, tokenize and label N rows.

        Returns:
            `input_ids`, `attention_mask`, `position_ids`, `labels` (N, T): prompts padded on the left, answers on the
            right; labels are -100 but for answer and end. `input_features` (N, M, F), and N `frames` that hold audio.
        """
        questions = load_questions(rows, self.audio_channels, self.processor, self.others)
        batch = questions.batch
        targets = [self.target(row) for row in questions.rows]
        answers = self.processor.tokenizer(targets, padding=True, padding_side="right", return_tensors="pt")
        ids = torch.cat([batch.input_ids, answers["input_ids"]], dim=1)
        mask = torch.cat([batch.attention_mask, answers["attention_mask"]], dim=1)
        labels = ids.masked_fill(mask == 0, IGNORE)
        labels[:, : batch.input_ids.shape[1]] = IGNORE
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
        return tokens | batch.audio_inputs


def count_longest_answer(dataset: Dataset, processor: ProcessorMixin) -> int:
    """Tokens of the longest answer to learn, its end included, among the hundred of most characters."""
    collator = AnswerCollator(processor)
    answers = [
        {"solution": solution, "style": style}
        for solution, style in zip(dataset["solution"], dataset["style"], strict=True)
    ]
    longest = sorted(answers, key=lambda row: -len(row["solution"]))[:100]
    return max(len(ids) for ids in processor.tokenizer([collator.target(row) for row in longest])["input_ids"])


def describe_pass(attention_mask: torch.Tensor, labels: torch.Tensor) -> str:
    """What a batch (N, T) takes memory for."""
    longest = int(attention_mask.cpu().sum(dim=1).max())
    answer = int((labels.cpu() != IGNORE).sum(dim=1).max())
    return (
        f"a pass over {len(labels)} question(s), the longest with its answer {longest} tokens, an answer up to {answer}"
    )


class AudioSFTTrainer(GreedyAccuracy, LoadsAhead, FiniteSteps, MemoryProbe, SelfContainedCheckpoints, Trainer):
    """Supervised fine-tuning of a Qwen2-Audio, all of it or its adapters.

    Args:
        model: the loaded model, with adapters or not.
        args: `transformers.TrainingArguments`; `remove_unused_columns` is turned off.
        train_dataset: as `load_train_dataset` makes it, of one prompt style: `choice` or `answer`.
        processor: the model's.
        audio_channels: see `AnswerCollator`.
        freeze: parts of the model that are not trained, of `PARTS`.
        **kwargs: `eval_questions`, see `accuracy.py`; the others are passed on to `transformers.Trainer`.
    """

    def __init__(
        self,
        model,
        args: TrainingArguments,
        train_dataset: Dataset,
        processor: ProcessorMixin,
        audio_channels: str = "first",
        freeze: Sequence[str] = (),
        **kwargs,
    ):
        args.remove_unused_columns = False  # the collator needs the rows' paths and texts
        collator = AnswerCollator(processor, audio_channels, train_dataset)
        collator.target(train_dataset[0])  # a style that cannot be learned is refused here, not in the first step
        check_audio_token(base_model(model), processor)
        # The mean log-prob of the answers' tokens, over the whole step, without ever making the prompts' logits.
        add_fused_lm_head(base_model(model))
        freeze_parts(model, freeze)
        super().__init__(model, args, collator, train_dataset, processing_class=processor, **kwargs)
        self.prompt_style, self.audio_channels = train_dataset[0]["style"], audio_channels

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of the answers, in nats per token; the mean is over the tokens of the whole optimizer step."""
        self.describe_batch = partial(describe_pass, inputs["attention_mask"], inputs["labels"])
        with needed_frames_only(base_model(self.accelerator.unwrap_model(model))):
            return super().compute_loss(model, inputs | {"fused_lm_head": True}, return_outputs, num_items_in_batch)

    def _largest_batch(self) -> dict[str, Any]:
        s = self.memory_settings
        assert s is not None
        return longest_answers(longest_questions(base_model(self.model), s, self.args.device), s)
