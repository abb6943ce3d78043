"""The least that a training step can take on a device: what has to be multiplied and read, from the model's
configuration, over the rates that the device reaches on nothing but that.

Counted are matrix products (of (m, k) and (k, n): 2 m k n operations; convolutions likewise) on tokens that are none of
them padding, attention over the keys that a query may see, the head on positions that are scored; and the bytes of
weights, caches and optimizer state. Left out, so that the floor is a lower bound: what goes element by element, what
gradient checkpointing computes again, the adapters' own products, and what processes send each other.

Shapes: N questions, G generations, P prompt tokens, audio included, C completion tokens.
"""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

ROW_BY_ROW, SHARED, SUPERVISED = WAYS = ("row by row", "shared prompt", "supervised")
# What a step is divided into, in its order.
PHASES = ("data", "encoder", "prefill", "decoding", "rewards", "reference", "policy forward", "backward", "optimizer")


@dataclass(frozen=True)
class Shape:
    """What a step works on. All questions are alike; a forward pass has one of them."""

    questions: int  # N
    generations: int  # G
    frames: int  # mel frames of a clip
    prompt: int  # P
    completion: int  # C


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, attention's apart, and bytes."""

    linear: int = 0
    attention: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.linear + other.linear, self.attention + other.attention, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Work":
        return Work(self.linear * times, self.attention * times, self.bytes * times)

    @property
    def operations(self) -> int:
        return self.linear + self.attention


@dataclass(frozen=True)
class Rates:
    """Of one device."""

    operations: float  # of matrix products, per second
    bytes: float  # read or written per second

    def seconds(self, work: Work) -> float:
        """The least time for this work: reading and multiplying can go on side by side."""
        return max(work.operations / self.operations, work.bytes / self.bytes)


def encode(config: PreTrainedConfig, frames: int) -> Work:
    """One clip of so many mel frames through encoder and projector."""
    audio, width = config.audio_config, config.audio_config.d_model
    positions = (frames - 1) // 2 + 1  # the second convolution halves the frames, the pooling the positions
    tokens = (positions - 2) // 2 + 1
    linear = 2 * positions * width * 3 * width
    linear += audio.encoder_layers * positions * 2 * (4 * width**2 + 2 * width * audio.encoder_ffn_dim)
    linear += 2 * tokens * width * config.text_config.hidden_size
    return first_convolution(config, frames) + Work(linear, audio.encoder_layers * 4 * positions**2 * width)


def first_convolution(config: PreTrainedConfig, frames: int) -> Work:
    """Apart, since nothing before it wants a gradient."""
    return Work(2 * frames * config.audio_config.num_mel_bins * 3 * config.audio_config.d_model)


def read(config: PreTrainedConfig, tokens: int, pairs: int) -> Work:
    """Tokens through the language model's layers, with so many pairs of a query and a key that it may see."""
    text = config.text_config
    return Work(2 * tokens * layer_weights(config), 4 * pairs * text.num_hidden_layers * text.hidden_size)


def backward(config: PreTrainedConfig, forward: Work, frames: int, clips: int, lora: bool) -> Work:
    """Of a forward pass that had so many clips: for each product one for the gradient of either factor. With adapters
    the weights want none, and nothing below the encoder's layers does."""
    first = first_convolution(config, frames) * clips
    if not lora:
        return Work(2 * forward.linear - first.linear, 2 * forward.attention, 2 * forward.bytes)
    second = 2 * ((frames - 1) // 2 + 1) * 3 * config.audio_config.d_model**2 * clips
    return Work(forward.linear - first.linear - second, 2 * forward.attention, forward.bytes)


def score(config: PreTrainedConfig, positions: int) -> Work:
    return Work(2 * positions * head_weights(config))


def layer_weights(config: PreTrainedConfig) -> int:
    """Of all the language model's matrices but embedding and head."""
    text = config.text_config
    keys = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    attention = 2 * text.hidden_size * (text.hidden_size + keys)
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def head_weights(config: PreTrainedConfig) -> int:
    return config.text_config.hidden_size * config.text_config.vocab_size


def encoder_weights(config: PreTrainedConfig) -> int:
    """Of encoder and projector."""
    audio, width = config.audio_config, config.audio_config.d_model
    layers = audio.encoder_layers * (4 * width**2 + 2 * width * audio.encoder_ffn_dim)
    return layers + 3 * width * (audio.num_mel_bins + width) + width * config.text_config.hidden_size


def cached_bytes(config: PreTrainedConfig, tokens: int, itemsize: int) -> int:
    """Of the keys and values of so many tokens."""
    text = config.text_config
    keys = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    return 2 * tokens * text.num_hidden_layers * keys * itemsize


def count(
    config: PreTrainedConfig, shape: Shape, way: str, trained: int, itemsize: int, lora: bool = False
) -> dict[str, Work]:
    """The work of a step's phases; those without matrix products or many bytes are not in it.

    Args:
        way: one of WAYS. Row by row, clips are 30 s long and everything is there G times; supervised, C is the answer's
            length, and G is 1.
        trained: parameters that the optimizer steps on, on this device.
        itemsize: bytes of a weight.
        lora: only adapters are trained.
    """
    N, P, C = shape.questions, shape.prompt, shape.completion
    G = 1 if way == SUPERVISED else shape.generations
    copies = G if way == ROW_BY_ROW else 1
    frames = 2 * config.audio_config.max_source_positions if way == ROW_BY_ROW else shape.frames
    clips = encode(config, frames) * (N * copies)
    # A prompt's last token starts every completion, whose own last one needs no pass.
    prompts = read(config, P - 1, (P - 1) * P // 2) * (N * copies)
    branches = read(config, C, C * (P - 1) + C * (C + 1) // 2) * (N * G) + score(config, N * G * C)
    text = itemsize * layer_weights(config)
    whole = text + itemsize * (head_weights(config) + encoder_weights(config))
    forward = clips + prompts + branches + Work(bytes=N * whole)
    work = {"policy forward": forward, "backward": backward(config, forward, frames, N * copies, lora)}
    # Weights, gradients and AdamW's two moments are read, all but the gradients written.
    work["optimizer"] = Work(bytes=7 * itemsize * trained)
    if way == SUPERVISED:
        return work
    cache = sum(cached_bytes(config, N * copies * (P - 1) + N * G * (t + 1), itemsize) for t in range(C))
    work["encoder"] = clips + Work(bytes=itemsize * encoder_weights(config))
    work["prefill"] = prompts + Work(bytes=text)
    work["decoding"] = branches + Work(bytes=C * (text + itemsize * head_weights(config)) + cache)
    work["reference"] = forward
    return work


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The most that this device reaches now: square matrices multiplied, and memory copied; the best of some runs."""
    size, length = (8192, 2**29) if device.type == "cuda" else (1024, 2**25)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    multiplying = fastest(lambda: torch.nn.functional.linear(left, right), device)
    copying = fastest(lambda: target.copy_(source), device)
    return Rates(2 * size**3 / multiplying, 2 * length / copying)


def fastest(run, device: torch.device, times: int = 10) -> float:
    """Seconds of the fastest of so many runs, fewer where they take over a second, after one that is not timed."""
    seconds = []
    run()
    while len(seconds) < times and sum(seconds) < 1:
        start = now(device)
        run()
        seconds.append(now(device) - start)
    return min(seconds)


def now(device: torch.device) -> float:
    """Seconds, when all that was begun on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
