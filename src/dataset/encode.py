"""Questions and clips -> the model's input tensors, on the mel frames that hold audio. What is Qwen2-Audio's own about
the input stands here: how many tokens a clip becomes, how long it may be, and the call of its processor.

Everything encodes here: rollouts, policy, reference, supervised fine-tuning, evaluation, `ask.py`. The processor's own
way is a window of 30 s for every clip; its frames behind the audio change nothing, since the encoder masks them.

Shapes: N questions, P prompt tokens (left-padded), M mel bins, F mel frames (as many as the longest clip needs).
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

if TYPE_CHECKING:  # only named here: importing them takes seconds, which `check.py` without a model need not wait
    import torch
    from transformers import BatchFeature, Qwen2AudioProcessor

# Two audio tokens. A prompt with a single one is taken by transformers 5 for one in old processors' unexpanded format.
MIN_SECONDS = 0.1
WINDOW_SECONDS = 30  # what Qwen2-Audio hears
MAX_PROMPT_LENGTH = 1024  # tokens; 10 s of audio are 250, its question about 60
PROBE = " \n a text \n "  # stands for any text, where only its place is wanted


def count_audio_tokens(samples: int, hop_length: int = 160) -> int:
    """The number of `<|AUDIO|>` tokens of a 16 kHz clip that fits the window: 40 ms each, 10 s are 250.

    >>> count_audio_tokens(160_000)
    250
    """
    return count_tokens_of_frames(-(-samples // hop_length))


def count_tokens_of_frames(frames: int) -> int:
    """The number of `<|AUDIO|>` tokens that so many mel frames become."""
    after_convolution = (frames - 1) // 2 + 1
    return (after_convolution - 2) // 2 + 1


def count_heard(processor: Qwen2AudioProcessor | None) -> int:
    """The longest clip that is heard in full, in samples; without a processor Qwen2-Audio's."""
    return processor.feature_extractor.n_samples if processor else WINDOW_SECONDS * SAMPLE_RATE


def check_clip_length(samples: int, processor: Qwen2AudioProcessor | None) -> None:
    """Raise a `DataError` for a clip that the processor would cut, or that is too short to be heard at all."""
    if samples > (window := count_heard(processor)):
        message = f"the clip lasts {samples / SAMPLE_RATE:.2f} s, the model hears {window / SAMPLE_RATE:g} s; "
        raise DataError(message + "cut the clip or remove its row", "clip too long")
    if samples < MIN_SECONDS * SAMPLE_RATE:
        message = f"the clip lasts {samples / SAMPLE_RATE:.3f} s, under the {MIN_SECONDS} s needed; remove its row"
        raise DataError(message, "clip too short")


def build_chat(processor: Qwen2AudioProcessor, text: str) -> str:
    """The whole prompt as text: system turn, user turn with the audio's placeholder and `text`, assistant header."""
    return processor.apply_chat_template(build_messages(text), add_generation_prompt=True, tokenize=False)


def needed_frames(frames: int, window: int) -> int:
    """How many frames the encoder must see of a clip of so many: those of the positions that they make and of one more,
    into which the convolutions reach. The clip's positions then come out as they do from the whole window."""
    positions = (frames - 1) // 2 + 1
    return min(2 * (positions + 1), window)


@dataclass
class Batch:
    """N encoded questions."""

    input_ids: torch.Tensor  # (N, P), left-padded
    attention_mask: torch.Tensor  # (N, P)
    input_features: torch.Tensor  # (N, M, F); if `encoded`, (N, W, A): what the encoder made of them
    frames: list[int]  # N, mel frames that hold audio; a tensor's values would have to be waited for
    encoded: bool = False
    waves: list[np.ndarray] = field(default_factory=list)  # N clips, float32 (samples,) at 16 kHz, for other engines

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def audio_inputs(self) -> dict[str, Any]:
        """The model's arguments beside the tokens, within `needed_frames_only`."""
        name = "encoded_clips" if self.encoded else "input_features"
        return {name: self.input_features, "frames": self.frames}

    def to(self, device: torch.device) -> Batch:
        tensors = (self.input_ids, self.attention_mask, self.input_features)
        ids, mask, features = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return replace(self, input_ids=ids, attention_mask=mask, input_features=features)

    def encoded_as(self, clips: torch.Tensor) -> Batch:
        """The same questions, with their clips (N, W, A) as the encoder made them."""
        return Batch(self.input_ids, self.attention_mask, clips, self.frames, encoded=True, waves=self.waves)

    def take(self, rows: list[int]) -> Batch:
        """Some of the questions, without padding that only the others need."""
        longest = int(self.attention_mask[rows].sum(dim=1).max())
        frames = [self.frames[row] for row in rows]
        if self.encoded:
            needed = count_tokens_of_frames(max(frames))
        else:
            needed = needed_frames(max(frames), self.input_features.shape[2])
        ids, mask = self.input_ids[rows, -longest:], self.attention_mask[rows, -longest:]
        waves = [self.waves[row] for row in rows] if self.waves else []
        return Batch(ids, mask, self.input_features[rows, :, :needed], frames, self.encoded, waves)


def load_and_encode(processor: Qwen2AudioProcessor, rows: list[dict], channels: str) -> Batch:
    """N rows of `load_train_dataset`: their clips, decoded by threads, with their prompts; raises as `load_audio` and
    `encode`."""
    with ThreadPoolExecutor() as pool:
        clips = list(pool.map(partial(load_audio, channels=channels), [row["audio_path"] for row in rows]))
    return replace(encode(processor, [row["prompt"] for row in rows], clips), waves=clips)


def encode(processor: Qwen2AudioProcessor, texts: list[str], clips: list[np.ndarray]) -> Batch:
    """Tokenize N user texts, as `build_question` makes them, with their N clips, float32 (samples,) at 16 kHz; a
    `DataError` if a clip is too long or too short, or a text holds one of the tokenizer's special tokens."""
    questions = [encode_question(processor, text, clip) for text, clip in zip(texts, clips, strict=True)]
    return join(questions, pad_id=processor.tokenizer.pad_token_id)


def encode_question(processor: Qwen2AudioProcessor, text: str, clip: np.ndarray) -> BatchFeature:
    """One question as the processor encodes it, but with the frames that its clip needs, not a whole window.

    A frame sees 25 ms of sound: with a little silence behind the clip, its frames are those of the padded window, to
    the last bit, and a 10 s clip takes a third of the time. Raises as `encode`, and the processor a `ValueError` where
    the ids hold another number of its audio tokens than the clip makes: passes do not look again.
    """
    check_no_special_token(text, processor)
    check_clip_length(len(clip), processor)
    extractor = processor.feature_extractor
    frames = needed_frames(-(-len(clip) // extractor.hop_length), extractor.nb_max_frames)
    # Half of a frame's Fourier window reaches over its end, and reflects there what stands before.
    samples = min((frames - 1) * extractor.hop_length + extractor.n_fft, extractor.n_samples)
    return processor(
        text=[build_chat(processor, text)],
        audio=[clip],
        audio_kwargs={"sampling_rate": SAMPLE_RATE, "max_length": samples},
        return_tensors="pt",
    )


def join(questions: list[BatchFeature], pad_id: int) -> Batch:
    """Questions that `encode_question` encoded -> a batch, padded to its own longest."""
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
        # The feature extractor fills its window with what it makes of silence, and so what is missing of it here.
        torch.cat([pad(each, (0, longest - each.shape[2]), mode="replicate") for each in features]),
        torch.cat([question["feature_attention_mask"].sum(1) for question in questions]).tolist(),
    )


def count_text_tokens(processor: Qwen2AudioProcessor, texts: list[str]) -> list[int]:
    """Tokens of each user text's whole prompt, without those of its clip."""
    before, found, after = build_chat(processor, PROBE).partition(PROBE)
    # Where the template puts texts in as they are: filling it in 40,000 times would take longer than the tokens do.
    chats = [before + text + after if found else build_chat(processor, text) for text in texts]
    return [len(ids) - 1 for ids in processor.tokenizer(chats)["input_ids"]]  # the placeholder is the clip's


def check_prompt(
    text: str, samples: int, text_tokens: int, processor: Qwen2AudioProcessor | None, max_prompt_length: int | None
) -> int:
    """The length in tokens of a prompt that can be asked as it is; 0 without a processor, which alone can tell.

    `text_tokens` are those of `count_text_tokens`, `samples` of the clip. Raises as `encode`, and where the prompt, its
    audio included, is over `max_prompt_length`.
    """
    check_clip_length(samples, processor)
    if processor is None:
        return 0
    check_no_special_token(text, processor)
    length = text_tokens + count_audio_tokens(samples, processor.feature_extractor.hop_length)
    if max_prompt_length is not None and length > max_prompt_length:
        message = f"the prompt has {length} tokens, over max_prompt_length {max_prompt_length}; "
        raise DataError(message + "raise --max_prompt_length or remove the row", "prompt too long")
    return length


def check_no_special_token(text: str, processor: Qwen2AudioProcessor) -> None:
    """Raise a `DataError` for a text that holds one of the tokenizer's special tokens."""
    if found := next((token for token in processor.tokenizer.all_special_tokens if token in text), None):
        message = f"the question {text!r:.80} holds the special token {found}, which the model would obey; reword it"
        raise DataError(message, "special token in the question")
