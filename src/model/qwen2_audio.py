"""What is Qwen2-Audio's own about the model: its parts."""

from collections.abc import Sequence

import torch
from peft import PeftModel

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
