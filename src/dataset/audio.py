"""Audio file -> 16 kHz mono float32. Its content decides how it is decoded, not its name: 46 of MMAU's `.wav` files are
MP3. libsndfile decodes what it can, FFmpeg (PyAV) the rest. A clip shorter than its header promises was cut off."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import soundfile

from .rows import DataError

SAMPLE_RATE = 16_000  # Hz, the rate of Qwen2-Audio's feature extractor
CHANNELS = ("first", "mean")
CUT_SECONDS = 0.1  # some writers' headers promise a little more than the file holds
UNKNOWN_BYTES, UNKNOWN_FRAMES = 0x7E000000, 2**36 - 1  # from here on, lengths are placeholders of files from a pipe
# libsndfile's note on a chunk shorter than its header says: `data : 160000 (should be 79978)`.
SHORT_CHUNK = re.compile(r"^ *(?:data|SSND|Data Size|BODY|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
MP3_LENGTH = re.compile(rb"\0{9}(?:Xing|Info|VBRI)")  # tag with the length
MP3_START = re.compile(rb"ID3|\xff[\xe0-\xff][\s\S]{2880}")  # less than two frames may be padding
FILE_START = re.compile(rb"fLaC\0\0\0\x22|OggS\0\x02")


def load_audio(path: str | Path, channels: str = "first") -> np.ndarray:
    """Decode the `first` channel of a clip, as in the paper, or the `mean` of all to float32 (samples,) at 16 kHz.
    Raises a `DataError` if the clip is missing, cut off or silent, does not decode, or holds NaN or nothing."""
    return resample(*decode(path, channels))


def resample(mono: np.ndarray, rate: int) -> np.ndarray:
    """Resample float32 (samples,) from `rate` Hz to 16 kHz with `librosa.resample`, as the paper did."""
    if rate != SAMPLE_RATE:
        import librosa  # here, since it takes seconds

        mono = librosa.resample(mono, orig_sr=rate, target_sr=SAMPLE_RATE)
    return np.ascontiguousarray(mono)


def count_samples(path: str | Path) -> int:
    """The number of samples that `load_audio` returns, from the header of an uncompressed file, else by decoding."""
    lengths, rates = zip(*((len(block), rate) for block, rate in _blocks(path, count_only=True)), strict=True)
    return -(-sum(lengths) * SAMPLE_RATE // rates[0])  # rounded up, as in librosa


def decode(path: str | Path, channels: str = "first") -> tuple[np.ndarray, int]:
    """As `load_audio`, but at the file's rate: float32 (samples,) and the rate in Hz."""
    if channels not in CHANNELS:
        raise ValueError(f"unknown audio channels {channels!r}; choose one of {', '.join(CHANNELS)}")
    parts = []
    for block, rate in _blocks(path):  # noqa: B007, all have the same rate
        parts.append(block[:, 0].copy() if channels == "first" else block.mean(axis=1))
    mono = np.concatenate(parts)
    if not np.isfinite(mono).all():
        raise DataError(f"{path}: holds NaN or infinite samples; remove its row", "clip with NaN or infinite samples")
    if not mono.any():
        raise DataError(f"{path}: is silent, every sample is zero; remove its row", "clip silent")
    return mono, rate


def open_sound(path: str | Path) -> soundfile.SoundFile | None:
    """Open a file with libsndfile by its content alone; None if libsndfile does not know the format."""
    if not os.path.exists(path):
        raise DataError(f"{path!s:.500}: no such audio file; check the path, or remove its row", "clip missing")
    if not os.path.isfile(path) or not os.path.getsize(path):
        raise DataError(f"{path}: is a folder, a pipe or empty; name an audio file", "clip is no audio file")
    try:
        return soundfile.SoundFile(os.open(path, os.O_RDONLY), closefd=True)  # a descriptor has no name to judge by
    except soundfile.LibsndfileError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable", "clip unreadable") from error


def _blocks(path: str | Path, count_only: bool = False) -> Iterator[tuple[np.ndarray, int]]:
    """Yield blocks of float32 (samples, channels) and their rate in Hz; with `count_only`, (samples, 0) if the header
    is right. FFmpeg decodes what libsndfile may cut: an MP3 without a length, and several concatenated files."""
    if (file := open_sound(path)) is None:
        yield from _ffmpeg(path, 0.0)
        return
    with file:
        frames, rate = file.frames if file.frames < UNKNOWN_FRAMES else 0, file.samplerate
        promised, present = map(int, note.groups()) if (note := SHORT_CHUNK.search(file.extra_info)) else (0, 0)
        if promised < UNKNOWN_BYTES and (promised - present) * max(frames, 1) > CUT_SECONDS * rate * present:
            raise DataError(f"{path}: is cut off, {present} of {promised} bytes exist; fetch it again", "clip cut off")
        is_compressed = file.format in ("FLAC", "OGG") or file.subtype.startswith("MPEG")
        content = Path(path).read_bytes() if is_compressed else b""
        block = np.empty((frames if count_only and not is_compressed else 0, 0))
        with suppress(soundfile.LibsndfileError):
            if not len(block):  # in one read, since an MP3 decodes differently after a seek
                block = file.read(frames, dtype="float32", always_2d=True)
        more = content and (len(FILE_START.findall(content)) > 1 or MP3_START.match(os.read(file.name, 4096)))
        if frames and len(block) == frames and not more:
            yield block, rate
        else:
            yield from _ffmpeg(path, frames / rate if file.format == "FLAC" or MP3_LENGTH.search(content) else 0.0)


def _ffmpeg(path: str | Path, promised: float) -> Iterator[tuple[np.ndarray, int]]:
    rate, decoded = 0, 0.0  # Hz, s
    options = {"protocol_whitelist": "none"}  # without it, files that a playlist names would be opened
    try:
        with open(path, "rb") as file, av.open(file, "r", options=options, metadata_errors="ignore") as container:
            stream = container.streams.audio[0]
            if "mp4" in container.format.name and stream.duration and stream.time_base:
                promised = float(stream.duration * stream.time_base)
            elif "webm" in container.format.name and len(container.streams) == 1:
                promised = (container.duration or 0) / av.time_base
            planar = av.AudioResampler(format="fltp")  # keeps rate and channels
            for packet in container.demux(stream):
                with suppress(av.InvalidDataError):  # for instance between two files in a row
                    for part in (part for frame in packet.decode() for part in planar.resample(frame)):
                        if rate not in (0, part.sample_rate):
                            raise ValueError("its sampling rate changes")
                        rate = part.sample_rate  # stream.rate may be half of it, for HE-AAC
                        decoded += part.samples / rate
                        yield part.to_ndarray().T, rate
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        reason = "clip damaged" if decoded else "clip is no audio file"
        raise DataError(f"{path}: no audio that decodes ({error}); convert it to wav", reason) from error
    if not decoded or decoded < promised - CUT_SECONDS:
        reason = "clip cut off" if decoded else "clip without samples"
        raise DataError(f"{path}: only {decoded:.2f} s of {promised:.2f} s decode; fetch it again", reason)
