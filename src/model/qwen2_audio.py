"""What is specific to Qwen2-Audio: its processor, parts, end tokens, and how a clip becomes embeddings. Another model
behind the same trainers needs a file like this one and `dataset/encode.py`.

Shapes: N questions, T tokens, M mel bins, F mel frames, A audio tokens, W width of the encoder, H hidden size of the
language model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoProcessor,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2AudioEncoder,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioModel,
    Qwen2AudioProcessor,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from dataset.encode import build_chat, count_tokens_of_frames, needed_frames

HEAD = "lm_head"  # takes no adapter, since its weights are multiplied with hidden states directly
# part -> its modules, by their names in transformers
PARTS = {
    "audio_encoder": ("audio_tower",),
    "projector": ("multi_modal_projector",),
    "language_model": ("language_model", HEAD),
}
# Modules that keep their dtype in a model of 4 or 8 bits. Encoder and projector are a thirteenth of the weights.
NOT_QUANTISED = (HEAD, "model.audio_tower", "model.multi_modal_projector")
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def load_processor(model: str | Path, processor: ProcessorMixin | None = None) -> Qwen2AudioProcessor:
    """A model's processor, or the given one, padding on the left; raises a `ValueError` if it cannot be used."""
    try:
        processor = processor or AutoProcessor.from_pretrained(model, trust_remote_code=False)
        if isinstance(processor, Qwen2AudioProcessor):
            build_chat(processor, "")  # finds a damaged template now
    except Exception as error:  # libraries raise anything on damaged files, from KeyError to jinja2's errors
        message = f"its processor cannot be loaded ({type(error).__name__}: {error}); if damaged, get its files again"
        if "trust_remote_code" in str(error):  # libraries recommend to allow it
            message = "its processor is code, and a model's code is never executed; use Qwen2-Audio's own processor"
        raise ValueError(f"{model}: {message}") from error
    if not isinstance(processor, Qwen2AudioProcessor):
        raise ValueError(f"{model}: its processor is a {type(processor).__name__}, not Qwen2-Audio's")
    processor.tokenizer.padding_side = "left"
    return processor


def end_ids(processor: Qwen2AudioProcessor) -> list[int]:
    """Ids that end an answer: those of `END_TOKENS`, and the tokenizer's end token."""
    tokenizer = processor.tokenizer
    return sorted({*tokenizer.convert_tokens_to_ids(END_TOKENS), tokenizer.eos_token_id})


def audio_token_id(model) -> int:
    """Id of `<|AUDIO|>`, the placeholder of a clip. No completion may hold it."""
    return model.config.audio_token_id


def check_audio_token(model, processor: Qwen2AudioProcessor) -> None:
    """Raise a `ValueError` if model and processor have different audio tokens."""
    if (written := processor.audio_token_id) != (read := audio_token_id(model)):
        found = f"the model takes token {read} for sound (audio_token_index in its config.json)"
        raise ValueError(f"{found}, its processor writes {written}; get both from one model")


def base_model(model):
    """The Qwen2-Audio below the adapters, if there are any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def freeze_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Exclude `parts` (keys of `PARTS`) and their adapters from training. Raises a `ValueError` for an unknown part, or
    if nothing is left to train."""
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"cannot freeze {', '.join(sorted(unknown))}: the model's parts are {', '.join(PARTS)}")
    # The sinusoids are always frozen. transformers 5 loads them as trainable, but the original did not train them.
    frozen = {"embed_positions", *(module for part in parts for module in PARTS[part])}
    for name, parameter in model.named_parameters():
        if frozen & set(name.split(".")):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {' '.join(parts)} leaves nothing to train")


def encoder_is_frozen(backbone: Qwen2AudioModel) -> bool:
    """Whether the audio encoder and its adapters are not trained, so that a clip's encoding never changes."""
    return not any(parameter.requires_grad for parameter in backbone.audio_tower.parameters())


@contextmanager
def needed_frames_only(model: Qwen2AudioForConditionalGeneration) -> Iterator[None]:
    """Within this context, forward passes of a Qwen2-Audio take `Batch.audio_inputs`: mel features of less than the
    full window that its own forward requires (`input_features`), or encoded clips from `pad_clips` (`encoded_clips`),
    and the list of `frames`. Embeddings are made inside the forward pass, so engines (DDP, ZeRO), adapters and
    gradient checkpointing work as usual. `model` is the one below them."""

    def embed(backbone, args, kwargs):
        if (frames := kwargs.pop("frames", None)) is None:
            return None
        input_ids, padded = kwargs.pop("input_ids"), kwargs.pop("encoded_clips", None)
        if padded is None:
            clips = encode_clips(backbone, kwargs.pop("input_features"), frames)
        else:
            clips = [clip[:, : count_tokens_of_frames(kept)].T for clip, kept in zip(padded, frames, strict=True)]
        kwargs["inputs_embeds"] = embed_prompts(backbone, input_ids, clips)
        return args, kwargs

    with model.model.register_forward_pre_hook(embed, with_kwargs=True):
        yield


def embed_prompts(backbone: Qwen2AudioModel, input_ids: torch.Tensor, clips: Sequence[torch.Tensor]) -> torch.Tensor:
    """Embeddings (N, T, H) of `input_ids` (N, T), with the projected `clips` of `encode_clips` in the places of their
    `<|AUDIO|>` tokens. The device is not waited for, as it would be by the gradient of `masked_scatter`."""
    embeddings = backbone.get_input_embeddings()(input_ids)
    audio = backbone.multi_modal_projector(torch.cat(list(clips))).to(embeddings.dtype)
    is_audio = (input_ids == audio_token_id(backbone)).flatten()
    torch._assert_async(is_audio.sum() == len(audio), "the prompts' audio tokens do not match their clips")
    places = torch.nonzero_static(is_audio, size=len(audio))[:, 0]
    return embeddings.flatten(0, 1).index_copy(0, places, audio).view_as(embeddings)


def pad_clips(clips: Sequence[torch.Tensor]) -> torch.Tensor:
    """The N clips of `encode_clips` as one tensor (N, W, A), padded in the last dimension as features are."""
    return pad_sequence(list(clips), batch_first=True).transpose(1, 2)


def encode_clips(backbone: Qwen2AudioModel, features: torch.Tensor, frames: list[int]) -> list[torch.Tensor]:
    """The encoder's output for N clips, before the projector: N tensors (audio tokens, W). `features` (N, M, F) hold N
    `frames` with audio, and F is at least `needed_frames`. Clips are encoded in groups of similar length."""
    encoded: dict[int, torch.Tensor] = {}
    for group in group_by_length(frames):
        kept = [frames[clip] for clip in group]
        longest = needed_frames(max(kept), features.shape[2])
        part = torch.stack([features[clip, :, :longest] for clip in group])  # indexing by a list would copy it there
        encoded |= zip(group, _encode_group(backbone.audio_tower, part, kept), strict=True)
    return [encoded[clip] for clip in range(len(frames))]


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices in groups in which no length is under 9/10 of the longest; one group under ZeRO-3, where all processes
    need the same number of passes."""
    if is_deepspeed_zero3_enabled():
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not groups or 10 * lengths[index] < 9 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    return groups


def _encode_group(encoder: Qwen2AudioEncoder, features: torch.Tensor, frames: list[int]) -> list[torch.Tensor]:
    """As `encode_clips`, for one group: the steps of `Qwen2AudioEncoder.forward` without LayerDrop, which Qwen2-Audio
    does not use. Sizes are computed on the CPU, so nothing waits for the device."""
    positions = [(clip - 1) // 2 + 1 for clip in frames]
    hidden = nn.functional.gelu(encoder.conv1(features.to(encoder.conv1.weight.dtype)))
    hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)[:, : max(positions)]
    places = torch.arange(hidden.shape[1], device=hidden.device)
    mask = None
    if min(positions) < max(positions):
        kept = torch.tensor(positions).to(hidden.device, non_blocking=True)
        sees = (places < kept[:, None])[:, None]  # (N, 1, positions); expanded to all queries, it would be slow on CPUs
        mask = as_attention_mask(sees, encoder.config, hidden.dtype)
    hidden = hidden + encoder.embed_positions(places)  # a call, since ZeRO-3 gathers a weight while its module runs
    hidden = nn.functional.dropout(hidden, p=encoder.dropout, training=encoder.training)
    for layer in encoder.layers:
        hidden = layer(hidden, mask)
    hidden = encoder.layer_norm(encoder.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))  # (N, A, W)
    return [clip[: count_tokens_of_frames(kept)] for clip, kept in zip(hidden, frames, strict=True)]


def as_attention_mask(sees: torch.Tensor, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The mask (N, 1, T, K) for attention from a boolean one: (N, T, K), or (N, 1, K) if all queries have the same. The
    mask for `eager` is of `dtype`."""
    if config._attn_implementation == "eager":  # adds the mask to the scores
        return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]
    return sees[:, None]
