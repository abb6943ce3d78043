"""A small Qwen2-Audio with random weights and its processor, made without downloads for demo, tests and benchmarks."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import sinusoids

from dataset.encode import build_chat
from dataset.prompt import DEFAULT_STYLE, STYLES, save_style
from model.qwen2_audio import END_TOKENS

IM_END, PAD = END_TOKENS
SPECIAL_TOKENS = (PAD, "<|im_start|>", IM_END, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")


def build_tokenizer(texts: Iterable[str], vocab_size: int = 400) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer (byte-level BPE) of at most `vocab_size` tokens, with merges learned from `texts`."""
    others = [token for token in SPECIAL_TOKENS if token not in END_TOKENS]
    blank = Qwen2Tokenizer(pad_token=PAD, eos_token=IM_END, extra_special_tokens=others, padding_side="left")
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    pieces = [piece for text in texts for piece in special.split(text)]
    return blank.train_new_from_iterator(pieces, vocab_size, show_progress=False)


def build_processor(
    texts: Iterable[str], vocab_size: int = 400, mel_bins: int = 64, seconds: int = 2
) -> Qwen2AudioProcessor:
    """A processor for clips of up to `seconds`, its vocabulary learned from `texts`, the chat template and the
    instructions of all prompt styles."""
    extractor = WhisperFeatureExtractor(mel_bins, chunk_length=seconds, return_attention_mask=True)
    chat = build_chat(Qwen2AudioProcessor(extractor, build_tokenizer(())), "")  # the class has a default template
    texts = [*texts, chat, *(style.instruction for style in STYLES.values())]
    return Qwen2AudioProcessor(extractor, build_tokenizer(texts, vocab_size))


def build_model(
    processor: Qwen2AudioProcessor,
    audio_size: int = 64,
    audio_layers: int = 2,
    audio_heads: int = 4,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    intermediate_size: int | None = None,
    vocab_size: int | None = None,
    initializer_range: float = 0.1,
) -> Qwen2AudioForConditionalGeneration:
    """A Qwen2-Audio with random weights (float32, in training mode) for this processor: by default less than a million
    parameters. `initializer_range` 0.02, usual for large models, learned nothing in 60 steps; 0.1 reached 80%."""
    tokenizer, extractor = processor.tokenizer, processor.feature_extractor
    pad = {"bos_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id}
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=extractor.feature_size,
        d_model=audio_size,
        encoder_layers=audio_layers,
        encoder_attention_heads=audio_heads,
        encoder_ffn_dim=4 * audio_size,
        max_source_positions=extractor.nb_max_frames // 2,  # the second convolution halves the frames
        initializer_range=initializer_range,
    )
    text = Qwen2Config(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate_size or 3 * hidden_size,
        initializer_range=initializer_range,
        eos_token_id=tokenizer.eos_token_id,
        **pad,
    )
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=processor.audio_token_id)
    model = Qwen2AudioForConditionalGeneration(config)
    positions = model.model.audio_tower.embed_positions  # fixed, as in Qwen2-Audio's checkpoint
    positions.weight = torch.nn.Parameter(sinusoids(*positions.weight.shape), requires_grad=False)
    # Qwen2-Audio-Instruct's defaults, so that code that relies on the defaults gets the same ones here.
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.5, "top_k": 20, "repetition_penalty": 1.1}
    ends = tokenizer.convert_tokens_to_ids(END_TOKENS)
    model.generation_config = GenerationConfig(**pad, eos_token_id=ends, **sampling)
    return model


def build_demo_model(
    folder: str | Path, processor: Qwen2AudioProcessor, seed: int = 1, style: str = DEFAULT_STYLE, **sizes
) -> Qwen2AudioForConditionalGeneration:
    """`build_model` with these sizes and weights from `seed`, saved to `folder` with processor and prompt style."""
    torch.manual_seed(seed)
    model = build_model(processor, **sizes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_style(folder, style)
    return model
