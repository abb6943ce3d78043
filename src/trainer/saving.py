"""Checkpoints that load by themselves, for both trainers.

Saved are the weights under the base checkpoint's tensor names whatever engine trained them, processor and prompt
style; loaded to resume is the same. Optimizer state and engines are left to transformers' `Trainer`.
"""

from peft import PeftModel
from transformers.conversion_mapping import get_model_conversion_mapping

from dataset.prompt import save_style
from model.qwen2_audio import base_model


class SelfContainedCheckpoints:
    """Mixin, to stand before the trainer class; expects its `processing_class` to be the processor."""

    prompt_style: str | None = None  # recorded in every checkpoint; None: no record

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, processor and prompt style: what AutoProcessor and the model class load by themselves."""
        # from_pretrained records how it renamed the tensors, and save_pretrained undoes that record; but loading under
        # ZeRO-3 records the legacy renamings too, used or not. Without them the names are the base checkpoint's.
        base = base_model(self.model)
        base._weight_conversions = get_model_conversion_mapping(base, add_legacy=False)
        super()._save(output_dir, state_dict=state_dict)
        if self.prompt_style is not None and self.args.should_save:
            save_style(output_dir or self.args.output_dir, self.prompt_style)

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
