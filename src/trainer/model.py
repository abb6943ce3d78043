"""What is Qwen2-Audio's own about the model: its parts, and checkpoints of it that load by themselves.

Saved are the weights under the base checkpoint's tensor names whatever engine trained them, processor and prompt
style; loaded to resume is the same. Optimizer state and engines are left to transformers' `Trainer`.
"""

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers.conversion_mapping import get_model_conversion_mapping

from dataset.prompt import save_style

# part -> the modules it is made of, by their names in transformers
PARTS = {
    "audio_encoder": ("audio_tower",),
    "projector": ("multi_modal_projector",),
    "language_model": ("language_model", "lm_head"),
}


def base_model(model):
    """The Qwen2-Audio itself, below adapters if there are any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def freeze_parts(model: torch.nn.Module, parts: Sequence[str]) -> None:
    """Exclude parts of a Qwen2-Audio, adapters on them included, from training; its sinusoids are in any case.

    Args:
        model: a `Qwen2AudioForConditionalGeneration`, or one with adapters.
        parts: keys of `PARTS`.

    Raises:
        ValueError: an unknown part, or nothing is left to train.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"cannot freeze {', '.join(sorted(unknown))}: the model's parts are {', '.join(PARTS)}")
    # transformers 5 loads the sinusoids as trainable; the original never trained them.
    frozen = {"embed_positions", *(module for part in parts for module in PARTS[part])}
    for name, parameter in model.named_parameters():
        if frozen & set(name.split(".")):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {' '.join(parts)} leaves nothing to train")


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
