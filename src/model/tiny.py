"""A small Qwen2-Audio with random weights, for demo, tests and benchmarks: no network, nobody else's files.

A real `Qwen2AudioForConditionalGeneration` with a real `Qwen2AudioProcessor`: less than a million parameters by
default, a vocabulary of its own, a window of 2 s. Leaves out training it.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import jinja2
import torch
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import sinusoids

from dataset.audio import SAMPLE_RATE
from dataset.prompt import DEFAULT_STYLE, STYLES, build_messages, save_style

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
SPECIAL_TOKENS = (PAD, IM_START, IM_END, AUDIO, AUDIO_BOS, AUDIO_EOS)

# Renders what Qwen2-Audio-Instruct's template renders.
CHAT_TEMPLATE = (
    "{% set audios = namespace(count=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"{IM_START}system\nYou are a helpful assistant.{IM_END}\n{{% endif %}}"
    f"{IM_START}{{{{ message['role'] }}}}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if 'audio' in part or 'audio_url' in part %}{% set audios.count = audios.count + 1 %}"
    f"Audio {{{{ audios.count }}}}: {AUDIO_BOS}{AUDIO}{AUDIO_EOS}\n"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    f"{IM_END}\n{{% endfor %}}{{% if add_generation_prompt %}}{IM_START}assistant\n{{% endif %}}"
)

FRAMES_PER_SECOND = 100
FRAMES_PER_POSITION = 2  # the encoder's second convolution halves the frames


def build_tokenizer(texts: Iterable[str], vocab_size: int = 400) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer (byte-level BPE, so that any text is encodable) with merges learned from `texts`.

    Args:
        texts: what the model will read and write; special tokens in them are left out of the learning.
        vocab_size: upper bound, special tokens included; fewer where `texts` hold no more pairs to merge.

    Raises:
        ValueError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size}: the bytes and special tokens alone take {least}")
    blank = Qwen2Tokenizer(
        pad_token=PAD,
        eos_token=IM_END,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (PAD, IM_END)],
        padding_side="left",
    )
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    pieces = [piece for text in texts for piece in special.split(text)]
    return blank.train_new_from_iterator(pieces, vocab_size, show_progress=False)


def build_processor(
    texts: Iterable[str], vocab_size: int = 400, mel_bins: int = 64, seconds: int = 2
) -> Qwen2AudioProcessor:
    """A `Qwen2AudioProcessor` for clips of up to `seconds`.

    Its vocabulary is learned from `texts`, the chat template and the instructions of all prompt styles.
    """
    chat = jinja2.Template(CHAT_TEMPLATE).render(messages=build_messages(""), add_generation_prompt=True)
    tokenizer = build_tokenizer([*texts, chat, *(style.instruction for style in STYLES.values())], vocab_size)
    extractor = WhisperFeatureExtractor(
        feature_size=mel_bins,
        chunk_length=seconds,
        sampling_rate=SAMPLE_RATE,
        hop_length=SAMPLE_RATE // FRAMES_PER_SECOND,
        return_attention_mask=True,
    )
    return Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)


def build_demo_model(
    folder: str | Path,
    texts: Iterable[str],
    seed: int = 1,
    vocab_size: int = 400,
    mel_bins: int = 64,
    seconds: int = 2,
    audio_size: int = 64,
    audio_layers: int = 2,
    audio_heads: int = 4,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    initializer_range: float = 0.1,
    style: str = DEFAULT_STYLE,
) -> tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]:
    """Build a Qwen2-Audio with random weights, and save it so that `folder` alone loads it, processor included.

    Args:
        folder: where to save; made if it is not there.
        texts: what the vocabulary is learned from, see `build_processor`.
        seed: decides the weights.
        vocab_size, mel_bins, seconds: of the processor; `seconds` is the longest clip, whole.
        audio_size, audio_layers, audio_heads: width, depth and attention heads of the encoder.
        hidden_size, layers, heads: the same of the language model.
        initializer_range: standard deviation of the weights. Large models take 0.02; at this width so small a value
            learned nothing in 60 steps in which 0.1 came to 80%.
        style: prompt style to record in the folder.

    Returns:
        Model (float32, in training mode) and processor.
    """
    processor = build_processor(texts, vocab_size, mel_bins, seconds)
    audio = {"d_model": audio_size, "encoder_layers": audio_layers, "encoder_attention_heads": audio_heads}
    text = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads}
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(_build_config(processor, audio, text, initializer_range))
    positions = model.model.audio_tower.embed_positions  # fixed, as in Qwen2-Audio's checkpoint
    positions.weight = torch.nn.Parameter(sinusoids(*positions.weight.shape), requires_grad=False)
    # Qwen2-Audio-Instruct's own defaults: who sets nothing inherits them here as there.
    im_end, pad = _end_ids(processor)
    model.generation_config = GenerationConfig(
        bos_token_id=pad,
        eos_token_id=[im_end, pad],
        pad_token_id=pad,
        do_sample=True,
        temperature=0.7,
        top_p=0.5,
        top_k=20,
        repetition_penalty=1.1,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_style(folder, style)
    return model.train(), processor


def _build_config(
    processor: Qwen2AudioProcessor, audio: dict, text: dict, initializer_range: float
) -> Qwen2AudioConfig:
    """The configuration for this processor; `audio` and `text` give width, depth and heads of the model's halves."""
    im_end, pad = _end_ids(processor)
    extractor = processor.feature_extractor
    return Qwen2AudioConfig(
        audio_config=audio
        | {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": extractor.feature_size,
            "encoder_ffn_dim": 4 * audio["d_model"],
            "max_source_positions": extractor.nb_max_frames // FRAMES_PER_POSITION,
            "initializer_range": initializer_range,
        },
        text_config=text
        | {
            "model_type": "qwen2",
            "vocab_size": len(processor.tokenizer),
            "intermediate_size": 3 * text["hidden_size"],
            "num_key_value_heads": text["num_attention_heads"],
            "max_position_embeddings": 4096,
            "bos_token_id": pad,
            "eos_token_id": im_end,
            "pad_token_id": pad,
            "initializer_range": initializer_range,
        },
        audio_token_index=processor.tokenizer.convert_tokens_to_ids(AUDIO),
    )


def _end_ids(processor: Qwen2AudioProcessor) -> list[int]:
    """Ids of the tokens that end a turn and a text."""
    return processor.tokenizer.convert_tokens_to_ids([IM_END, PAD])
