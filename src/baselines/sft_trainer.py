"""Supervised fine-tuning on the same questions, prompts and audio as GRPO, the baseline of the paper's title. This
module makes the batches for transformers' `Trainer`. Only the answers' tokens count in the loss.

Shapes: N questions, T tokens (prompt and answer), M mel bins, F mel frames.
"""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import ProcessorMixin, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from dataset.encode import Batch, load_and_encode
from dataset.prompt import STYLES, extract_answer
from model.qwen2_audio import base_model, check_audio_token, freeze_parts, needed_frames_only
from trainer.saving import SelfContainedCheckpoints
from trainer.shared_prompt import IGNORE


class AudioSFTTrainer(SelfContainedCheckpoints, Trainer):
    """Supervised fine-tuning of a Qwen2-Audio or its adapters.

    Args:
        model: the loaded model, with or without adapters.
        args: `remove_unused_columns` is turned off.
        train_dataset: from `load_train_dataset`, in one prompt style: `choice` or `answer`.
        processor: the model's; saved with every checkpoint.
        audio_channels: `first` or `mean`, see `load_audio`.
        freeze: parts of the model that are not trained, of `PARTS`.
        **kwargs: passed to `transformers.Trainer`.

    Raises a `ValueError` for a prompt style with thoughts, which the data does not hold.
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
        args.remove_unused_columns = False  # batches are made from the rows' paths and texts
        check_audio_token(base_model(model), processor)
        add_fused_lm_head(base_model(model))  # computes the loss without the prompts' logits
        freeze_parts(model, freeze)
        super().__init__(model, args, self.collate, train_dataset, processing_class=processor, **kwargs)
        self.prompt_style, self.audio_channels = train_dataset[0]["style"], audio_channels
        self.target(train_dataset[0])  # raises for a style with thoughts

    def load(self, rows: list[dict]) -> tuple[list[dict], Batch]:
        """The clips of N rows, decoded by threads and encoded with their prompts."""
        return rows, load_and_encode(self.processing_class, rows, self.audio_channels)

    def target(self, row: dict) -> str:
        """The text to learn: the right answer in the row's style, and the end token."""
        return STYLES[row["style"]].target(extract_answer(row["solution"])) + self.processing_class.tokenizer.eos_token

    def collate(self, rows: list[dict]) -> dict[str, Any]:
        """N rows -> `input_ids`, `attention_mask`, `position_ids`, `labels` (N, T), `input_features` (N, M, F), and N
        `frames` as a list. Prompts are padded on the left, answers on the right. Labels are -100 except for the answer
        and its end token."""
        rows, batch = self.load(rows)
        targets = [self.target(row) for row in rows]
        answers = self.processing_class.tokenizer(targets, padding=True, padding_side="right", return_tensors="pt")
        ids = torch.cat([batch.input_ids, answers["input_ids"]], dim=1)
        mask = torch.cat([batch.attention_mask, answers["attention_mask"]], dim=1)
        labels = ids.masked_fill(mask == 0, IGNORE)
        labels[:, : batch.input_ids.shape[1]] = IGNORE
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
        return tokens | batch.audio_inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of the answers in nats per token, averaged over the tokens of the whole optimizer step."""
        with needed_frames_only(base_model(self.accelerator.unwrap_model(model))):
            return super().compute_loss(model, inputs | {"fused_lm_head": True}, return_outputs, num_items_in_batch)
