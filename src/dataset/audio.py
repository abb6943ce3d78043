"""Audio file -> 16 kHz mono float32. Trusts the content, never the name: 46 of MMAU's `.wav` are MP3.

libsndfile decodes what it can, FFmpeg (PyAV) the rest. A clip is as long as what decodes; where no header is known to
tell, it is decoded to be counted. What is wrong is a `DataError` that names the clip, the same for all who ask; that it
was cut off shows where a header promises more: not in Ogg, raw AAC, or an MP3 without a length tag.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import soxr

from .rows import DataError

SAMPLE_RATE = 16_000  # Hz, what Qwen2-Audio's feature extractor takes
CHANNELS = ("first", "mean")
CUT_SECONDS = 0.1  # a header may promise this much more than the file holds: sloppy writers do
FULL_SCALE = 1 - 2**-15  # the largest 16-bit sample
# In libsndfile's notes: `Bytes/sec : 32000`, `data : 160000 (should be 79978)`: promised, and there.
PROMISED = re.compile(r"^ *(?:data|SSND|Data Size|BODY|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
BYTES_PER_SECOND = re.compile(r"^ +Bytes/sec +: ([1-9]\d*)", re.MULTILINE)
# A length from here on, or 0, stands for one that the writer, as to a pipe, does not know: 0x7F000000 or all ones.
STREAM_BYTES, STREAM_FRAMES = 0x7E000000, 2**36 - 1
MP3_LENGTH = re.compile(rb"\0{9}(?:Xing|Info|VBRI)")  # the tag in an MP3's first frame that says its length
FILE_START = {"FLAC": b"fLaC\0\0\0\x22", "OGG": b"OggS\0\x02"}
MORE_MP3 = re.compile(rb"ID3|\xff[\xe0-\xff][\s\S]{2880}")  # a file; two frames may be padding, other tags are an end


class MissingAudio(DataError, FileNotFoundError):
    """There is no such audio file."""


@dataclass(frozen=True)
class ClipReport:
    """A usable clip."""

    samples: int  # at 16 kHz
    clipped: float = 0.0  # share of the samples at full scale; known only once decoded


class _Header(NamedTuple):
    frames: int = 0  # samples per channel; 0 where only decoding tells
    rate: int = SAMPLE_RATE  # Hz
    promised: float = 0.0  # s that FFmpeg has to find, if it is the one to decode
    libsndfile: bool = False  # it decodes all of the file; else FFmpeg does


def load_audio(path: str | Path, channels: str = "first") -> np.ndarray:
    """Decode a clip in any format that libsndfile or FFmpeg reads (wav, FLAC, MP3, Ogg, m4a, ...) at any sampling rate.

    Args:
        channels: `first` keeps the first channel, as the paper did; `mean` averages all of them.

    Returns:
        float32 array of shape (samples,), 16 kHz, nominally within [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decoded, was cut off, or is silent; its samples are none, NaN or infinite; `channels`.
    """
    return resample(*_decode(path, channels))


def resample(mono: np.ndarray, rate: int) -> np.ndarray:
    """Samples (samples,) of `rate` Hz as float32 of 16 kHz: those of `librosa.resample`, which calls soxr too and takes
    seconds to import."""
    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(mono, dtype=np.float32)
    samples = _count_resampled(len(mono), rate)
    found = soxr.resample(mono, rate, SAMPLE_RATE)[:samples]
    return np.pad(found, (0, samples - len(found))).astype(np.float32, copy=False)


def _count_resampled(frames: int, rate: int) -> int:
    return -(-frames * SAMPLE_RATE // rate)  # rounded up, as librosa does


def count_samples(path: str | Path) -> int:
    """The number of samples that `load_audio` would return, or what it would raise, as far as the length tells."""
    frames, rate, *_ = header = _read_header(path)
    for block, rate in () if frames else _blocks(path, header):  # noqa: B007, they have the same
        frames += len(block)
    return _count_resampled(frames, rate)


def examine_clip(
    path: str | Path, deep: bool = False, channels: str = "first", longest: float = float("inf")
) -> ClipReport | DataError:
    """Examine one clip: its length, and with `deep` its samples too (NaN, silence, clipping).

    The samples of a clip of more than `longest` are not kept: it may be hours, and is of no use to who asks so.
    Errors are returned, not raised, so that clips can be examined in other threads.
    """
    try:
        samples = count_samples(path)
        if not deep or samples > longest:
            return ClipReport(samples)
        mono, _ = _decode(path, channels)
        return ClipReport(samples, clipped=float(np.mean(np.abs(mono) >= FULL_SCALE)))
    except DataError as error:
        return error


def _decode(path: str | Path, channels: str) -> tuple[np.ndarray, int]:
    """Samples (samples,) of the channel(s) to hear, at the file's own rate, and that rate in Hz."""
    if channels not in CHANNELS:
        raise ValueError(f"unknown audio channels {channels!r}: choose one of {', '.join(CHANNELS)}")
    parts = []
    for block, rate in _blocks(path, _read_header(path)):  # noqa: B007, they have the same
        # Reduced to one channel before resampling: resampling is linear and per channel, and the costly part.
        parts.append(block[:, 0].copy() if channels == "first" else block.mean(axis=1))
    mono = np.concatenate(parts)
    if not np.isfinite(mono).all():
        raise DataError(f"{path}: the audio holds NaN or infinite samples", "clip with NaN or infinite samples")
    if not mono.any():
        raise DataError(f"{path}: the audio is silent, every sample is zero; remove its row", "clip silent")
    return mono, rate


def open_sound(path: str | Path) -> soundfile.SoundFile | None:
    """Open what libsndfile reads, by its content alone: a descriptor has no name. None for another file, a `DataError`
    for what is no file with something in it."""
    sound = None
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            sound = soundfile.SoundFile(os.open(path, os.O_RDONLY), closefd=True)
    except soundfile.LibsndfileError:
        pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingAudio(f"{path}: no such audio file; check the path, or remove its row", "clip missing") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{path}: links lead in a circle; link to the file", "clip is a symlink loop") from error
        raise DataError(f"{str(path)[:200]}: cannot be read ({error.strerror})", "clip unreadable") from error
    except ValueError as error:  # a zero byte or half a surrogate pair in the name
        raise DataError(f"{str(path)!r}: no file can have this name ({error}); mend it", "clip unreadable") from error
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: is a folder, not an audio file; name the file in it", "clip is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is a device or pipe, not an audio file", "clip is no audio file")
    if status.st_size == 0:
        raise DataError(f"{path}: an empty file, not an audio file; fetch it again", "clip is an empty file")
    return sound


def _read_header(path: str | Path) -> _Header:
    """How long a file is, where its header can be believed, and who decodes it; a wav that was cut off is found."""
    if (file := open_sound(path)) is None:
        return _Header()
    with file:
        seconds, is_mp3 = file.frames / file.samplerate, file.subtype.startswith("MPEG")
        if (size := PROMISED.search(file.extra_info)) and int(size[1]) < STREAM_BYTES:
            rate, lacking = BYTES_PER_SECOND.search(file.extra_info), int(size[1]) - int(size[2])
            if (missing := lacking / int(rate[1]) if rate else seconds * lacking / max(1, int(size[2]))) > CUT_SECONDS:
                message = f"{path}: cut off, {seconds:.2f} s of {seconds + missing:.2f} s are there; fetch it again"
                raise DataError(message, "clip cut off")
        if not 0 < file.frames < STREAM_FRAMES or not file.seekable():
            return _Header(libsndfile=0 < file.frames < STREAM_FRAMES)
        if not (is_mp3 or file.format in FILE_START) or _is_all(file, path):
            return _Header(file.frames, file.samplerate, libsndfile=True)
        promises = file.format == "FLAC" or (is_mp3 and MP3_LENGTH.search(Path(path).read_bytes()))
        return _Header(promised=seconds if promises else 0.0)


def _is_all(file: soundfile.SoundFile, path: str | Path) -> bool:
    """Whether the samples that libsndfile counts are there, and no others behind them: it guesses the length of an MP3
    without a tag from the first frame, and hears the first of several files in a row."""
    start, tail = FILE_START.get(file.format), min(file.frames, int(CUT_SECONDS * file.samplerate))
    try:
        if start and Path(path).read_bytes().count(start) > 1:
            return False
        file.seek(file.frames - tail)
        return len(file.read(tail)) == tail and (bool(start) or not MORE_MP3.match(os.read(file.name, 4096)))
    except (soundfile.LibsndfileError, OSError):
        return False


def _blocks(path: str | Path, header: _Header) -> Iterator[tuple[np.ndarray, int]]:
    """All samples in parts (samples, channels), float32, each with its rate in Hz; at least one, or a `DataError`."""
    rates = set()
    try:
        for block, rate in _libsndfile(path, header) if header.libsndfile else _ffmpeg(path, header.promised):
            rates.add(rate)
            yield block, rate
    except DataError:
        raise
    except (soundfile.LibsndfileError, av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path}: breaks off or is damaged ({error}); fetch it again", "clip damaged") from error
    if len(rates) > 1:
        raise DataError(f"{path}: its sampling rate changes, {sorted(rates)} Hz; convert it to wav", "clip damaged")
    if not rates:
        raise DataError(f"{path}: the audio holds no samples; fetch it again or remove its row", "clip without samples")


def _libsndfile(path: str | Path, header: _Header) -> Iterator[tuple[np.ndarray, int]]:
    sound = open_sound(path)
    assert sound is not None, "the header was read by libsndfile"
    with sound as file:
        # At once where the length is known: between two parts it would seek, after which an MP3 decodes differently.
        while len(block := file.read(header.frames or 2**20, dtype="float32", always_2d=True)):
            yield block, file.samplerate


def _ffmpeg(path: str | Path, promised: float) -> Iterator[tuple[np.ndarray, int]]:
    heard = lost = 0.0  # s
    with open(path, "rb") as file:
        try:  # it sees neither the file's name nor, by no protocol, the files that a playlist names
            container = av.open(file, mode="r", options={"protocol_whitelist": "none"}, metadata_errors="ignore")
            stream = container.streams.audio[0]
        except (av.FFmpegError, IndexError) as error:
            message = f"{path}: not an audio file that libsndfile can read, and no sound for FFmpeg; convert it to wav"
            raise DataError(message, "clip is no audio file") from error
        if "mp4" in container.format.name and stream.duration and stream.time_base:
            promised = float(stream.duration * stream.time_base)
        elif "webm" in container.format.name and len(container.streams) == 1:
            promised = (container.duration or 0) / av.time_base
        planar = av.AudioResampler(format="fltp")  # keeps rate and channels
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:  # as between two files in a row
                lost += float((packet.duration or 0) * (stream.time_base or 0))
                continue
            for part in (part for frame in frames for part in planar.resample(frame)):
                heard += part.samples / part.sample_rate  # the stream's rate may be half of it, for HE-AAC
                yield part.to_ndarray().T, part.sample_rate
    if heard < promised - CUT_SECONDS:
        raise DataError(f"{path}: cut off before the end of its {promised:.2f} s; fetch it again", "clip cut off")
    if lost > CUT_SECONDS:
        raise ValueError(f"{lost:.2f} s of it do not decode")
