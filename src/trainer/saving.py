"""Checkpoints that load by themselves, for both trainers.

Saves the weights under the base checkpoint's tensor names, whatever engine trained them, the processor's files
unchanged, and the prompt style. transformers' `Trainer` writes what a run needs to resume.
"""

from typing import Any

from peft import PeftModel

from dataset.prompt import save_style
from model.checkpoints import complete_checkpoint, keep_base_names
from model.qwen2_audio import base_model


class SelfContainedCheckpoints:
    """Mixin that precedes the trainer class; `processing_class` is the processor."""

    processing_class: Any
    prompt_style: str | None = None  # recorded in every checkpoint; None: no record

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, processor and prompt style, so that transformers alone can load them."""
        keep_base_names(base_model(self.model))
        # Set aside, since `Trainer` would write it in a format that transformers 4 cannot read.
        processor, self.processing_class = self.processing_class, None
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.processing_class = processor
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            if self.prompt_style is not None:
                save_style(folder, self.prompt_style)
            complete_checkpoint(folder, processor)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load weights. `Trainer` does not know the checkpoint's tensor names: it would warn and keep the base's."""
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype, use_safetensors=True)
            model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """For `load_best_model_at_end`: as `_load_from_checkpoint`, unless an engine loads it."""
        if self.is_deepspeed_enabled or isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
