"""All that is Qwen2-Audio's own: its processor, parts, end tokens, and how a clip becomes embeddings.

Another model behind the same trainers gets a file like this one. Leaves out how clips and questions are encoded
(`dataset/encode.py`).

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

HEAD = "lm_head"  # its weights are multiplied with hidden states directly, so it takes no adapter
# part -> the modules it is made of, by their names in transformers
PARTS = {
    "audio_encoder": ("audio_tower",),
    "projector": ("multi_modal_projector",),
    "language_model": ("language_model", HEAD),
}
# What stays as it is in a model of 4 or 8 bits: the head, and the ears, a thirteenth of the weights.
NOT_QUANTISED = (HEAD, "model.audio_tower", "model.multi_modal_projector")
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def load_processor(model: str | Path, processor: ProcessorMixin | None = None) -> Qwen2AudioProcessor:
    """A model's processor, or the given one, padding on the left; a `ValueError` where it is damaged, or another's."""
    try:
        processor = processor or AutoProcessor.from_pretrained(model, trust_remote_code=False)
        if isinstance(processor, Qwen2AudioProcessor):
            build_chat(processor, "")  # so that a damaged template shows now
    except Exception as error:  # over damaged files libraries raise anything, from KeyError to jinja2's
        if "trust_remote_code" in str(error):  # they advise to allow it
            message = f"{model}: its processor is code that comes with the model, which is never executed"
            raise ValueError(f"{message}; use Qwen2-Audio's own files") from error
        message = f"{model}: its processor cannot be loaded ({type(error).__name__}: {error})"
        raise ValueError(f"{message}; get its files again, if they are damaged") from error
    if not isinstance(processor, Qwen2AudioProcessor):
        raise ValueError(f"{model}: its processor is a {type(processor).__name__}, not Qwen2-Audio's")
    processor.tokenizer.padding_side = "left"
    return processor


def end_ids(processor: Qwen2AudioProcessor) -> list[int]:
    """Ids that end an answer: both of Qwen2-Audio's, and the tokenizer's own."""
    tokenizer = processor.tokenizer
    return sorted({*tokenizer.convert_tokens_to_ids(END_TOKENS), tokenizer.eos_token_id})


def audio_token_id(model) -> int:
    """Id of `<|AUDIO|>`, which stands for sound: no completion may hold it."""
    return model.config.audio_token_id


def check_audio_token(model, processor: Qwen2AudioProcessor) -> None:
    """Raise a `ValueError` where the processor writes another token for sound than the model hears."""
    written, heard = processor.audio_token_id, audio_token_id(model)
    if written != heard:
        raise ValueError(
            f"the model takes token {heard} for sound (audio_token_index in its config.json), its processor writes "
            f"{written}: the files do not belong together; get them again"
        )


def base_model(model):
    """The Qwen2-Audio itself, below adapters if there are any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def freeze_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Exclude `parts` (keys of `PARTS`) of a Qwen2-Audio, adapters on them included, from training; a `ValueError` for
    an unknown part, or where nothing is left to train."""
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"cannot freeze {', '.join(sorted(unknown))}: the model's parts are {', '.join(PARTS)}")
    # The sinusoids in any case: transformers 5 loads them as trainable, the original never trained them.
    frozen = {"embed_positions", *(module for part in parts for module in PARTS[part])}
    for name, parameter in model.named_parameters():
        if frozen & set(name.split(".")):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {' '.join(parts)} leaves nothing to train")


def encoder_is_frozen(backbone: Qwen2AudioModel) -> bool:
    """Whether nothing of the audio encoder is trained, adapters on it included: a clip is then encoded the same in
    every pass."""
    return not any(parameter.requires_grad for parameter in backbone.audio_tower.parameters())


@contextmanager
def needed_frames_only(model: Qwen2AudioForConditionalGeneration) -> Iterator[None]:
    """Within this context, forward passes of a Qwen2-Audio take mel features (`input_features`) of any length that
    `encode` makes, with the list of how many `frames` hold audio in the place of a mask; or, in the place of features,
    `encoded_clips` as `pad_clips` makes them.

    Its own forward insists on the whole window of 30 s. Here the backbone gets the embeddings instead, inside the
    forward pass, so that engines (DDP, ZeRO), adapters and gradient checkpointing see nothing unusual; `model` is the
    one below them.
    """

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

    with model.model.register_forward_pre_hook(embed, with_kwargs=True):  # removed at the end
        yield


def embed_prompts(backbone: Qwen2AudioModel, input_ids: torch.Tensor, clips: Sequence[torch.Tensor]) -> torch.Tensor:
    """Embeddings (N, T, H) of `input_ids` (N, T), the clips' in the places of their `<|AUDIO|>` tokens.

    `clips` are those of `encode_clips`, which go through the projector here. That tokens and clips agree is seen to
    where questions are encoded, and by `check_audio_token`; here the device checks it without being waited for. (For
    the gradient of `masked_scatter`, a shorter way to put the clips in their places, it would be.)
    """
    embeddings = backbone.get_input_embeddings()(input_ids)
    audio = backbone.multi_modal_projector(torch.cat(list(clips))).to(embeddings.dtype)
    is_audio = (input_ids == audio_token_id(backbone)).flatten()
    torch._assert_async(is_audio.sum() == len(audio), "the prompts' audio tokens are not as many as their clips make")
    places = torch.nonzero_static(is_audio, size=len(audio))[:, 0]
    return embeddings.flatten(0, 1).index_copy(0, places, audio).view_as(embeddings)


def pad_clips(clips: Sequence[torch.Tensor]) -> torch.Tensor:
    """`encode_clips`' N clips in one tensor (N, W, A), which is padded where features are: at its last dimension."""
    return pad_sequence(list(clips), batch_first=True).transpose(1, 2)


def encode_clips(backbone: Qwen2AudioModel, features: torch.Tensor, frames: list[int]) -> list[torch.Tensor]:
    """The N clips as the encoder makes them, before the projector: each (its audio tokens, W).

    The encoder sees groups of like length. Of the `features` (N, M, F), N `frames` hold audio, F are `needed_frames` or
    more.
    """
    encoded: dict[int, torch.Tensor] = {}
    for group in group_by_length(frames):
        kept = [frames[clip] for clip in group]
        longest = needed_frames(max(kept), features.shape[2])
        part = torch.stack([features[clip, :, :longest] for clip in group])  # a list as an index would be copied there
        encoded |= zip(group, _encode_group(backbone.audio_tower, part, kept), strict=True)
    return [encoded[clip] for clip in range(len(frames))]


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices in groups in which no length is under 9/10 of the longest.

    Under ZeRO-3 there is one group: each pass gathers weights with the other processes, which may have other lengths.
    """
    if is_deepspeed_zero3_enabled():
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not groups or 10 * lengths[index] < 9 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    return groups


def _encode_group(encoder: Qwen2AudioEncoder, features: torch.Tensor, frames: list[int]) -> list[torch.Tensor]:
    """`needed_frames` of N clips encoded: for each clip (its audio tokens, W).

    The steps of `Qwen2AudioEncoder.forward`, without LayerDrop, which no Qwen2-Audio has. All sizes are counted on the
    CPU: nothing here waits for the device.
    """
    positions = [(clip - 1) // 2 + 1 for clip in frames]
    hidden = nn.functional.gelu(encoder.conv1(features.to(encoder.conv1.weight.dtype)))
    hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)[:, : max(positions)]
    places = torch.arange(hidden.shape[1], device=hidden.device)
    mask = None
    if min(positions) < max(positions):
        kept = torch.tensor(positions).to(hidden.device, non_blocking=True)
        heard = (places < kept[:, None])[:, None]  # (N, 1, positions); spread to all queries, it would cost CPUs time
        mask = as_attention_mask(heard, encoder.config, hidden.dtype)
    # Called, not read: under ZeRO-3 a weight is there while its module runs.
    hidden = hidden + encoder.embed_positions(places)
    hidden = nn.functional.dropout(hidden, p=encoder.dropout, training=encoder.training)
    for layer in encoder.layers:
        hidden = layer(hidden, mask)
    hidden = encoder.layer_norm(encoder.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))  # (N, A, W)
    return [clip[: count_tokens_of_frames(kept)] for clip, kept in zip(hidden, frames, strict=True)]


def as_attention_mask(sees: torch.Tensor, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Who sees whom, (N, T, K) or alike for all queries (N, 1, K), as attention takes it: (N, 1, T, K). `dtype` is that
    of a mask for `eager`."""
    if config._attn_implementation == "eager":  # which adds its mask to the attention's scores
        return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]
    return sees[:, None]
