"""Audio file -> 16 kHz mono float32. Trusts the file's content, never its name; knows nothing of models.

What is wrong with a clip is a `DataError`: `count_samples` says what the header and the file's size tell, in a tenth of
a millisecond; `examine_clip` decodes as well. `load_audio` is the lenient one: it takes what is left of a clip that was
cut off, and silence.
"""

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import soundfile

from .rows import DataError

SAMPLE_RATE = 16_000  # Hz, what Qwen2-Audio's feature extractor takes
CHANNELS = ("first", "mean")
CUT_SECONDS = 0.1  # a header may promise this much more than the file holds: sloppy writers do
FULL_SCALE = 1 - 2**-15  # the largest 16-bit sample
# In libsndfile's notes on a wav file: `Bytes/sec : 32000`, `data : 160000 (should be 79978)`: promised, and there.
PROMISED_BYTES = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
BYTES_PER_SECOND = re.compile(r"^ +Bytes/sec +: (\d+)", re.MULTILINE)
UNKNOWN_LENGTH = 0xFFFFFFFF  # what a stream's writer promises


class MissingAudio(DataError, FileNotFoundError):
    """There is no such audio file."""


@dataclass(frozen=True)
class ClipReport:
    """A usable clip."""

    samples: int  # at 16 kHz
    clipped: float = 0.0  # share of the samples at full scale; known only once decoded


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
    mono, rate = _decode(path, channels)
    if rate != SAMPLE_RATE:
        mono = librosa.resample(mono, orig_sr=rate, target_sr=SAMPLE_RATE)
    return np.ascontiguousarray(mono, dtype=np.float32)


def count_samples(path: str | Path) -> int:
    """The number of samples that `load_audio` would return, from the file's header; whether all are there is checked.

    A wav, FLAC or MP3 file that was cut off is found out; libsndfile hides it for the other formats.

    Raises:
        FileNotFoundError, DataError: as `load_audio`, as far as the header tells; a file that was cut off.
    """
    with _open(path) as file:
        there = file.frames / file.samplerate
        if (missing := _missing_seconds(file)) > CUT_SECONDS:
            message = f"{path}: cut off, {there:.2f} s of {there + missing:.2f} s are there; fetch it again"
            raise DataError(message, "clip cut off")
        if not _reaches_the_end(file):
            raise DataError(f"{path}: cut off before the end of its {there:.2f} s; fetch it again", "clip cut off")
        if file.frames == 0:
            raise _no_samples(path)
        return -(-file.frames * SAMPLE_RATE // file.samplerate)  # rounded up, as librosa does


def examine_clip(
    path: str | Path, deep: bool = False, channels: str = "first", longest: float = float("inf")
) -> ClipReport | DataError:
    """Examine one clip: its header, and with `deep` its samples too (NaN, silence, clipping).

    A clip of more than `longest` samples is not decoded: it may be hours, and is of no use to who asks so.
    Errors are returned, not raised, so that clips can be examined in other threads.
    """
    try:
        samples = count_samples(path)
        if not deep or samples > longest:
            return ClipReport(samples)
        mono, _ = _decode(path, channels)
        if not mono.any():
            raise DataError(f"{path}: the audio is silent, every sample is zero; remove its row", "clip silent")
        return ClipReport(samples, clipped=float(np.mean(np.abs(mono) >= FULL_SCALE)))
    except DataError as error:
        return error


def _decode(path: str | Path, channels: str) -> tuple[np.ndarray, int]:
    """Samples (samples,) of the channel(s) to hear, at the file's own rate, and that rate in Hz."""
    if channels not in CHANNELS:
        raise ValueError(f"unknown audio channels {channels!r}: choose one of {', '.join(CHANNELS)}")
    with _open(path) as file:
        try:
            samples = file.read(dtype="float32", always_2d=True)  # (samples, channels)
        except soundfile.LibsndfileError as error:
            message = f"{path}: the audio breaks off or is damaged ({error.error_string}); fetch or convert it again"
            raise DataError(message, "clip damaged") from error
        rate = file.samplerate
    # Reduced to one channel before resampling: resampling is linear and per channel, and the costly part.
    mono = samples[:, 0] if channels == "first" else samples.mean(axis=1)
    if mono.size == 0:
        raise _no_samples(path)
    if not np.isfinite(mono).all():
        message = f"{path}: the audio holds NaN or infinite samples; convert it again"
        raise DataError(message, "clip with NaN or infinite samples")
    return mono, rate


def _no_samples(path) -> DataError:
    message = f"{path}: the audio holds no samples; remove its row or fetch the clip again"
    return DataError(message, "clip without samples")


def _open(path: str | Path) -> soundfile.SoundFile:
    """An audio file, or a `DataError` that names it."""
    _check_is_file(path)
    try:
        # A descriptor has no name, so libsndfile looks at the content alone; SoundFile closes it.
        return soundfile.SoundFile(os.open(path, os.O_RDONLY), closefd=True)
    except soundfile.LibsndfileError as error:
        message = f"{path}: not an audio file that libsndfile can read ({error.error_string}); convert it to wav"
        raise DataError(message, "clip is no audio file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "clip unreadable") from error


def _check_is_file(path: str | Path) -> None:
    """Raise what keeps `path` from being a file with something in it."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"{path}: no such audio file; check the path, or remove its row from the data file"
        raise MissingAudio(message, "clip missing") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            message = f"{path}: symbolic links that lead in a circle; link to the file itself"
            raise DataError(message, "clip is a symlink loop") from error
        raise DataError(f"{str(path)[:200]}: cannot be read ({error.strerror})", "clip unreadable") from error
    except ValueError as error:  # a zero byte or half a surrogate pair in the name
        raise DataError(f"{str(path)!r}: no file can have this name ({error}); mend it", "clip unreadable") from error
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: is a folder, not an audio file; name the file in it", "clip is a folder")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise DataError(f"{path}: is a device or pipe, not an audio file", "clip is no audio file")
    if status.st_size == 0:
        raise DataError(f"{path}: an empty file, not an audio file; fetch it again", "clip is an empty file")


def _missing_seconds(file: soundfile.SoundFile) -> float:
    """How much of the audio that a wav file's header promises is not in the file, by libsndfile's notes on it."""
    promised, rate = PROMISED_BYTES.search(file.extra_info), BYTES_PER_SECOND.search(file.extra_info)
    if not promised or not rate or int(promised[1]) == UNKNOWN_LENGTH:
        return 0.0
    return (int(promised[1]) - int(promised[2])) / max(1, int(rate[1]))


def _reaches_the_end(file: soundfile.SoundFile) -> bool:
    """Whether the end of a FLAC or MP3 file, whose headers name the length too, is there to be decoded."""
    if file.format not in ("FLAC", "MP3"):
        return True
    try:
        file.seek(max(0, file.frames - 1 - int(CUT_SECONDS * file.samplerate)))
        return len(file.read(1)) > 0 or file.frames == 0
    except soundfile.LibsndfileError:
        return False
