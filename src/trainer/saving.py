"""Checkpoints that load by themselves, for both trainers.

Saved are the weights under the base checkpoint's tensor names whatever engine trained them, the processor's files as
they came, and the prompt style; so loaded to resume. Optimizer state and engines are left to transformers' `Trainer`.
"""

from peft import PeftModel

from dataset.prompt import save_style
from model.checkpoints import complete_checkpoint, keep_base_names
from model.qwen2_audio import base_model


class SelfContainedCheckpoints:
    """Mixin, to stand before the trainer class; expects its `processing_class` to be the processor."""

    prompt_style: str | None = None  # recorded in every checkpoint; None: no record

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, processor and prompt style: what AutoProcessor and the model class load by themselves."""
        keep_base_names(base_model(self.model))
        # Set aside, the processor is not saved by `Trainer`, which would write it anew.
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
        """Load weights to resume from. The checkpoint's names are the base model's, which `Trainer` would not find in
        transformers 5's model, warn, and go on from the base weights."""
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """For `load_best_model_at_end`, where no engine loads: as `_load_from_checkpoint`."""
        if self.is_deepspeed_enabled or isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
