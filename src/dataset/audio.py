"""Audio file -> 16 kHz mono float32. Trusts the file's content, never its name; knows nothing of models."""

import os
from pathlib import Path

import librosa
import numpy as np
import soundfile

SAMPLE_RATE = 16_000  # Hz, what Qwen2-Audio's feature extractor takes
CHANNELS = ("first", "mean")


def load_audio(path: str | Path, channels: str = "first") -> np.ndarray:
    """Decode a clip in any format that libsndfile reads (wav, FLAC, MP3, Ogg, ...) at any sampling rate.

    Args:
        path: the file; what its name ends in does not matter (46 of MMAU's `.wav` files are MP3).
        channels: `first` keeps the first channel, as the paper did; `mean` averages all of them.

    Returns:
        float32 array of shape (samples,), 16 kHz, nominally within [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, holds no samples, or holds NaN or infinite ones; unknown `channels`.
    """
    if channels not in CHANNELS:
        raise ValueError(f"unknown audio channels {channels!r}: choose one of {', '.join(CHANNELS)}")
    with _open(path) as file:
        try:
            samples = file.read(dtype="float32", always_2d=True)  # (samples, channels)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path}: the audio breaks off or is damaged ({error.error_string}); fetch or convert it again") from error
        rate = file.samplerate
    # Reduced to one channel before resampling: resampling is linear and per channel, and the costly part.
    mono = samples[:, 0] if channels == "first" else samples.mean(axis=1)
    if mono.size == 0:
        raise ValueError(f"{path}: the audio holds no samples; remove its row or fetch the clip again")
    if not np.isfinite(mono).all():
        raise ValueError(f"{path}: the audio holds NaN or infinite samples; convert it again")
    if rate != SAMPLE_RATE:
        mono = librosa.resample(mono, orig_sr=rate, target_sr=SAMPLE_RATE)
    return np.ascontiguousarray(mono, dtype=np.float32)


def count_samples(path: str | Path) -> int:
    """The number of samples that `load_audio` would return, from the file's header alone.

    Raises:
        FileNotFoundError, ValueError: as `load_audio`, as far as the header tells.
    """
    with _open(path) as file:
        if file.frames == 0:
            raise ValueError(f"{path}: the audio holds no samples; remove its row or fetch the clip again")
        return -(-file.frames * SAMPLE_RATE // file.samplerate)  # rounded up, as librosa does


def _open(path: str | Path) -> soundfile.SoundFile:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such audio file; check the path, or remove its row from the data file")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not an audio file")
    try:
        # An open descriptor has no name, so libsndfile looks at the content alone; SoundFile closes it.
        return soundfile.SoundFile(os.open(path, os.O_RDONLY), closefd=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not an audio file that libsndfile can read ({error.error_string}); convert it to wav") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
