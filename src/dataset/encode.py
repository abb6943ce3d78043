"""Questions and clips -> the model's input tensors, for training and evaluation alike. The processor alone would pad
every clip to 30 s. The encoder masks the frames behind the audio, so most of them are omitted here.

Shapes: N questions, P prompt tokens (left-padded), M mel bins, F mel frames, A audio tokens, W width of the encoder.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .audio import SAMPLE_RATE, load_audio
from .prompt import build_messages
from .rows import DataError

if TYPE_CHECKING:  # importing them takes seconds, and `check.py` without a model does not need them
    import torch
    from transformers import BatchFeature, Qwen2AudioProcessor

MIN_SECONDS = 0.1  # two audio tokens; transformers 5 takes a single one for the unexpanded format of old processors
WINDOW_SECONDS = 30  # longest clip of Qwen2-Audio
MAX_PROMPT_LENGTH = 1024  # tokens; 10 s of audio are 250, its question about 60


def count_audio_tokens(samples: int, hop_length: int = 160) -> int:
    """The number of `<|AUDIO|>` tokens of a 16 kHz clip within the window: one per 40 ms.

    >>> count_audio_tokens(160_000)
    250
    """
    return count_tokens_of_frames(-(-samples // hop_length))


def count_tokens_of_frames(frames: int) -> int:
    """The number of `<|AUDIO|>` tokens that so many mel frames become."""
    return ((frames - 1) // 2 - 1) // 2 + 1  # a convolution of stride 2, then pooling in pairs


def needed_frames(frames: int, window: int) -> int:
    """The number of frames that the encoder needs of a clip with so many: those of its positions after convolution, and
    of one more into which the convolutions reach. The positions then equal those of a full window."""
    return min(2 * ((frames - 1) // 2 + 2), window)


def window_samples(processor: Qwen2AudioProcessor | None) -> int:
    """The longest clip that the model takes, in samples; Qwen2-Audio's without a processor."""
    return processor.feature_extractor.n_samples if processor else WINDOW_SECONDS * SAMPLE_RATE


def check_clip_length(samples: int, processor: Qwen2AudioProcessor | None) -> None:
    """Raise a `DataError` if a clip is longer than the model's window or shorter than `MIN_SECONDS`."""
    if samples > (window := window_samples(processor)):
        limit = f"the model takes {window / SAMPLE_RATE:g} s at most; cut the clip or remove its row"
        raise DataError(f"the clip lasts {samples / SAMPLE_RATE:.2f} s, {limit}", "clip too long")
    if samples < MIN_SECONDS * SAMPLE_RATE:
        message = f"the clip lasts {samples / SAMPLE_RATE:.3f} s, under the {MIN_SECONDS} s needed; remove its row"
        raise DataError(message, "clip too short")


def check_no_special_token(text: str, processor: Qwen2AudioProcessor) -> None:
    """Raise a `DataError` if a text holds one of the tokenizer's special tokens."""
    if found := next((token for token in processor.tokenizer.all_special_tokens if token in text), None):
        message = f"the question {text!r:.80} holds the special token {found}, which the model would obey; reword it"
        raise DataError(message, "special token in the question")


@dataclass
class Batch:
    """N encoded questions."""

    input_ids: torch.Tensor  # (N, P), left-padded
    attention_mask: torch.Tensor  # (N, P)
    input_features: torch.Tensor  # (N, M, F); if `encoded`, the encoder's output (N, W, A)
    frames: list[int]  # N, mel frames that hold audio; a list, since reading a tensor would wait for the device
    encoded: bool = False
    waves: list[np.ndarray] = field(default_factory=list)  # N clips, float32 (samples,) at 16 kHz, for other engines

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def audio_inputs(self) -> dict[str, Any]:
        """The model's arguments for the clips, within `needed_frames_only`."""
        name = "encoded_clips" if self.encoded else "input_features"
        return {name: self.input_features, "frames": self.frames}

    def to(self, device: torch.device) -> Batch:
        names = ("input_ids", "attention_mask", "input_features")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def encoded_as(self, clips: torch.Tensor) -> Batch:
        """The same questions with the encoder's output (N, W, A) for their clips."""
        return replace(self, input_features=clips, encoded=True)

    def take(self, rows: list[int]) -> Batch:
        """The questions of these rows, without padding that only the others need."""
        longest = int(self.attention_mask[rows].sum(dim=1).max())
        frames = [self.frames[row] for row in rows]
        most, window = max(frames), self.input_features.shape[2]
        needed = count_tokens_of_frames(most) if self.encoded else needed_frames(most, window)
        ids, mask = self.input_ids[rows, -longest:], self.attention_mask[rows, -longest:]
        waves = [self.waves[row] for row in rows] if self.waves else []
        return Batch(ids, mask, self.input_features[rows, :, :needed], frames, self.encoded, waves)


def load_and_encode(processor: Qwen2AudioProcessor, rows: list[dict], channels: str) -> Batch:
    """Decode N rows' clips in threads, and encode them with their prompts. Raises as `load_audio` and `encode`."""
    with ThreadPoolExecutor() as pool:
        clips = list(pool.map(partial(load_audio, channels=channels), [row["audio_path"] for row in rows]))
    return replace(encode(processor, [row["prompt"] for row in rows], clips), waves=clips)


def encode(processor: Qwen2AudioProcessor, texts: list[str], clips: list[np.ndarray]) -> Batch:
    """Encode N user texts, as from `build_question`, with their N clips, float32 (samples,) at 16 kHz. Raises a
    `DataError` if a clip is too long or too short, or a text holds one of the tokenizer's special tokens."""
    questions = [encode_question(processor, text, clip) for text, clip in zip(texts, clips, strict=True)]
    return join(questions, pad_id=processor.tokenizer.pad_token_id)


def encode_question(processor: Qwen2AudioProcessor, text: str, clip: np.ndarray) -> BatchFeature:
    """Encode one question with the frames that its clip needs. With a little silence behind the clip, they equal those
    of the padded window to the last bit. Raises as `encode`."""
    check_no_special_token(text, processor)
    check_clip_length(len(clip), processor)
    extractor = processor.feature_extractor
    frames = needed_frames(-(-len(clip) // extractor.hop_length), extractor.nb_max_frames)
    # Half of the last frame's Fourier window reaches over the end, where the extractor reflects the samples before it.
    samples = min((frames - 1) * extractor.hop_length + extractor.n_fft, extractor.n_samples)
    audio_kwargs = {"sampling_rate": SAMPLE_RATE, "max_length": samples}
    return processor(text=[build_chat(processor, text)], audio=[clip], audio_kwargs=audio_kwargs, return_tensors="pt")


def join(questions: list[BatchFeature], pad_id: int) -> Batch:
    """Questions from `encode_question` -> a batch, padded to its longest."""
    import torch
    from torch.nn.functional import pad
    from torch.nn.utils.rnn import pad_sequence

    ids = [question["input_ids"][0] for question in questions]
    features = [question["input_features"] for question in questions]
    longest = max(each.shape[2] for each in features)
    pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
    return Batch(
        pad_left(ids, padding_value=pad_id),
        pad_left([torch.ones_like(row) for row in ids]),
        # Padding repeats the feature extractor's value for silence, as it does itself.
        torch.cat([pad(each, (0, longest - each.shape[2]), mode="replicate") for each in features]),
        torch.cat([question["feature_attention_mask"].sum(1) for question in questions]).tolist(),
    )


def build_chat(processor: Qwen2AudioProcessor, text: str) -> str:
    """The whole prompt as text: system turn, user turn with the audio's placeholder and `text`, assistant header."""
    return processor.apply_chat_template(build_messages(text), add_generation_prompt=True, tokenize=False)
