"""Decoding: the content decides, not the name; 16 kHz mono float32 comes out, or an error that names the file."""

from functools import partial

import av
import numpy as np
import pytest
import soundfile

from conftest import write_tone
from dataset.audio import SAMPLE_RATE, count_samples, load_audio, resample
from dataset.rows import DataError

FORMATS = {
    "plain.wav": dict(),
    "8 kHz.wav": dict(rate=8_000),
    "192 kHz.wav": dict(rate=192_000),
    "44.1 kHz.wav": dict(rate=44_100),
    "six channels.wav": dict(channels=6, rate=48_000),
    "24 bit.wav": dict(subtype="PCM_24"),
    "float.wav": dict(subtype="FLOAT"),
    "mp3 named.wav": dict(format="MP3", rate=44_100),
    "flac named.raw": dict(format="FLAC"),
    "ogg": dict(format="OGG", subtype="VORBIS"),
    'it\'s "quoted" 狗.flac': dict(format="FLAC"),
}


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_is_soxrs_to_the_last_bit(rate):
    """As in the paper's code, and the lengths are those that `count_samples` computes."""
    import soxr

    mono = np.random.default_rng(rate).normal(scale=0.1, size=rate + 7).astype(np.float32)
    resampled, expected = resample(mono, rate), soxr.resample(mono, rate, SAMPLE_RATE)
    length = -(-len(mono) * SAMPLE_RATE // rate)
    assert resampled.dtype == np.float32 and len(resampled) == length
    np.testing.assert_array_equal(resampled, np.pad(expected[:length], (0, max(0, length - len(expected)))))


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    settings = dict(FORMATS[name])
    path = tmp_path / name
    write_tone(tmp_path / "made", 1.0, frequency=440, **{"format": "WAV"} | settings)
    (tmp_path / "made").rename(path)
    audio = load_audio(path)
    assert audio.dtype == np.float32 and audio.ndim == 1 and audio.flags["C_CONTIGUOUS"]
    assert len(audio) == count_samples(path)
    assert abs(len(audio) - SAMPLE_RATE) < 2_000  # MP3 pads
    spectrum = np.abs(np.fft.rfft(audio[2_000:14_000]))
    assert abs(spectrum.argmax() * SAMPLE_RATE / 12_000 - 440) < 3, "the tone is not where it was put"


def test_channels(tmp_path):
    left, right = np.full(1600, 0.5, np.float32), np.full(1600, -0.1, np.float32)
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([left, right], axis=1), SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path), left)
    np.testing.assert_allclose(load_audio(path, "mean"), (left + right) / 2)
    with pytest.raises(ValueError, match="'right'.*first, mean"):
        load_audio(path, "right")


def refusal(read, path) -> DataError:
    """The error of a clip, which names it."""
    with pytest.raises(DataError) as raised:
        read(path)
    assert str(path) in str(raised.value)
    return raised.value


def test_files_without_audio_are_named(tmp_path):
    contents = {"gone.wav": None, "empty.wav": b"", "text.wav": b"RIFF is a name"}
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for read in (load_audio, count_samples):
            reason = refusal(read, tmp_path / name).reason
            assert reason == ("clip missing" if content is None else "clip is no audio file")


def test_folder_no_samples_and_not_a_number(tmp_path):
    assert refusal(load_audio, tmp_path).reason == "clip is no audio file"
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    for read in (load_audio, count_samples):
        assert refusal(read, tmp_path / "none.wav").reason == "clip without samples"
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan, 0], np.float32), SAMPLE_RATE, subtype="FLOAT")
    assert refusal(load_audio, tmp_path / "nan.wav").reason == "clip with NaN or infinite samples"


# Good files decode whole, whatever their headers say

LAST = 0.5  # s of a tone at the end of each sound, by which the end is recognised


def sound(seconds: float, rate: int, loud_first: bool = False) -> np.ndarray:
    """Noise and near silence, which take an encoder many and few bits, then 1 kHz; (samples,)."""
    half, last = int((seconds - LAST) / 2 * rate), int(LAST * rate)
    quiet, loud = (np.random.default_rng(0).normal(size=half) * scale for scale in (1e-4, 0.2))
    tone = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(last) / rate)
    return np.concatenate([*((loud, quiet) if loud_first else (quiet, loud)), tone]).astype(np.float32)


class Pipe:
    """What cannot be gone back in, so that no header can be filled in afterwards."""

    def __init__(self):
        self.content = b""

    def write(self, part: bytes) -> int:
        self.content += part
        return len(part)


def encode(
    path, format: str, codec: str, seconds: float, pipe=False, loud_first=False, rate=44_100, container_options=None, **options
):  # fmt: skip
    """Encode a sound as ffmpeg does, to a file or to a pipe."""
    made = Pipe()
    with av.open(made if pipe else str(path), "w", format=format, options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono", options=options)
        as_encoded = av.AudioResampler(format=stream.codec_context.format)
        frame = av.AudioFrame.from_ndarray(sound(seconds, rate, loud_first)[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for part in as_encoded.resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    if pipe:
        path.write_bytes(made.content)


def copy_stream(path, source, format: str) -> None:
    """What `ffmpeg -i SOURCE -c copy -f FORMAT pipe:1` writes."""
    made = Pipe()
    with av.open(str(source)) as old, av.open(made, "w", format=format) as new:
        stream = new.add_stream_from_template(old.streams.audio[0])
        for packet in old.demux(old.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    path.write_bytes(made.content)


def with_length(path, format: str, place: bytes, length: int, subtype: str = "PCM_16") -> None:
    """A file that names `length` as the bytes of its sound, as one that was written to a pipe does."""
    soundfile.write(path, sound(4, 16_000), 16_000, format=format, subtype=subtype)
    content = bytearray(path.read_bytes())
    at = content.index(place) + len(place)
    content[at : at + 4] = length.to_bytes(4, "little" if format == "WAV" else "big")
    path.write_bytes(content)


def copied(path, format: str, codec: str, **settings) -> None:
    encode(path.with_name("source"), format, codec, 4, **settings)
    copy_stream(path, path.with_name("source"), format)


def twice(path, make, **settings) -> None:
    """Two files of 2 s in a row."""
    make(path, seconds=2, **settings)
    path.write_bytes(path.read_bytes() * 2)


MP3 = partial(encode, format="mp3", codec="libmp3lame")
FLAC = partial(encode, format="flac", codec="flac")
OPUS = partial(encode, codec="libopus", rate=48_000)
VBR = {"flags": "+qscale", "global_quality": "472"}  # ffmpeg's -q:a 4
CANNOT_SEEK = [
    *(("WAV", subtype) for subtype in ("GSM610", "G721_32", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32")),
    *(("AU", subtype) for subtype in ("G721_32", "G723_24", "G723_40")),
    *(("XI", "DPCM_8"), ("XI", "DPCM_16"), ("AIFF", "GSM610"), ("W64", "GSM610")),
]
WHOLE = {  # what is made, of 4 s
    "MP3, variable, to a pipe, loud later": partial(MP3, seconds=4, pipe=True, **VBR),
    "MP3, variable, to a pipe, loud first": partial(MP3, seconds=4, pipe=True, loud_first=True, **VBR),
    "MP3, average, to a pipe, loud later": partial(MP3, seconds=4, pipe=True, abr="1", b="96000"),
    "MP3, average, to a pipe, loud first": partial(MP3, seconds=4, pipe=True, loud_first=True, abr="1", b="96000"),
    "MP3, constant, to a pipe": partial(MP3, seconds=4, pipe=True, b="96000"),
    "MP3, without its tag by a stream copy": partial(copied, format="mp3", codec="libmp3lame", **VBR),
    "MP3, two in a row": partial(twice, make=MP3, **VBR),
    "MP3, two in a row, to a pipe": partial(twice, make=MP3, pipe=True, **VBR),
    "MP3 in a wav": partial(encode, format="wav", codec="libmp3lame", seconds=4, **VBR),
    "FLAC, to a pipe": partial(FLAC, seconds=4, pipe=True),
    "FLAC, stream copy": partial(copied, format="flac", codec="flac"),
    "FLAC, two in a row": partial(twice, make=FLAC),
    "FLAC, two in a row, to a pipe": partial(twice, make=FLAC, pipe=True),
    "Ogg, to a pipe": partial(OPUS, format="ogg", seconds=4, pipe=True),
    "Ogg, two in a row": partial(twice, make=OPUS, format="ogg"),
    "m4a": partial(encode, format="mp4", codec="aac", seconds=4),
    "AAC": partial(encode, format="adts", codec="aac", seconds=4),
    "AAC, two in a row": partial(twice, make=encode, format="adts", codec="aac"),
    "webm": partial(OPUS, format="webm", seconds=4),
    "webm, to a pipe": partial(OPUS, format="webm", seconds=4, pipe=True),
    "CAF, to a pipe": partial(encode, format="caf", codec="pcm_s16le", seconds=4, pipe=True),
    "wav, to a pipe": partial(encode, format="wav", codec="pcm_s16le", seconds=4, pipe=True),
    "AU, all ones": partial(with_length, format="AU", place=b".snd\0\0\0\x18", length=0xFFFFFFFF),
    **{
        f"AIFF, {length:#x}": partial(with_length, format="AIFF", place=b"SSND", length=length)
        for length in (0, 0x7F000008, 0x7FFFFFFF, 0xFFFFFFFF)
    },
    **{
        f"wav of {subtype}, {length:#x}": partial(
            with_length, format="WAV", place=b"data", length=length, subtype=subtype
        )
        for subtype in ("PCM_16", "PCM_24", "FLOAT", "IMA_ADPCM", "GSM610")
        for length in (0, 0x7FFFEFFD, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
    },
    **{
        f"{format} of {subtype}": lambda path, format=format, subtype=subtype: soundfile.write(
            path, sound(4, 44_100), 44_100, format=format, subtype=subtype
        )
        for format, subtype in CANNOT_SEEK
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_good_file_decodes_whole(tmp_path, name):
    path = tmp_path / "clip"
    WHOLE[name](path)
    audio = load_audio(path)
    assert 4 <= len(audio) / SAMPLE_RATE < 4.11  # encoders pad; AAC by what it needs to start, twice of two in a row
    assert count_samples(path) == len(audio)
    end = audio[-6_400:-2_400]
    assert abs(np.abs(np.fft.rfft(end * np.hanning(4_000))).argmax() * SAMPLE_RATE / 4_000 - 1000) < 10


def test_tags_behind_the_sound_are_none_of_it(tmp_path):
    MP3(tmp_path / "clip", seconds=4, **VBR)
    audio, content = load_audio(tmp_path / "clip"), (tmp_path / "clip").read_bytes()
    for tag in (b"TAG" + b"x" * 125, b"APETAGEX" + b"x" * 5000, bytes(5000)):
        (tmp_path / "clip").write_bytes(content + tag)
        assert np.array_equal(load_audio(tmp_path / "clip"), audio)


@pytest.mark.parametrize("name", ["plain.wav", "8 kHz.wav", "six channels.wav", "24 bit.wav", "float.wav"])
def test_the_header_of_an_uncompressed_file_is_enough_to_count(tmp_path, monkeypatch, name):
    write_tone(tmp_path / name, 5.0, **{"format": "WAV"} | FORMATS[name])
    monkeypatch.delattr(soundfile.SoundFile, "read")
    monkeypatch.delattr(av, "open")
    assert count_samples(tmp_path / name) == 5 * SAMPLE_RATE


# Damage


def cut(path, make, **settings) -> None:
    make(path, **settings)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def two_rates(path, make, **settings) -> None:
    make(path.with_name("second"), seconds=2, rate=16_000, **settings)
    make(path, seconds=2, **settings)
    path.write_bytes(path.read_bytes() + path.with_name("second").read_bytes())


def write_zeros(path, **format) -> None:
    soundfile.write(path, np.zeros(SAMPLE_RATE, np.float32), SAMPLE_RATE, **format)


DAMAGED = {
    **{
        f"cut {format}": (partial(cut, make=write_tone, seconds=5.0, format=format), "clip cut off")
        for format in ("WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "SVX", "FLAC", "MP3")
    },
    "cut GSM": (partial(cut, make=write_tone, seconds=5.0, format="WAV", subtype="GSM610"), "clip cut off"),
    "cut VBR MP3": (partial(cut, make=MP3, seconds=4, **VBR), "clip cut off"),
    "cut m4a": (partial(cut, make=encode, format="mp4", codec="aac", seconds=4), "clip is no audio file"),
    "cut m4a, header first": (
        partial(cut, make=encode, format="mp4", codec="aac", seconds=4, container_options={"movflags": "faststart"}),
        "clip cut off",
    ),
    "cut webm": (partial(cut, make=OPUS, format="webm", seconds=4), "clip cut off"),
    "MP3, two rates in a row": (lambda path: two_rates(path, MP3, **VBR), "clip damaged"),
    "AAC, two rates in a row": (lambda path: two_rates(path, encode, format="adts", codec="aac"), "clip damaged"),
    "wav of zeros": (partial(write_zeros, format="WAV"), "clip silent"),
    "FLAC of zeros": (partial(write_zeros, format="FLAC"), "clip silent"),
    "MP3 of zeros": (partial(write_zeros, format="MP3"), "clip silent"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_clip_is_refused(tmp_path, name):
    make, reason = DAMAGED[name]
    make(tmp_path / "clip")
    assert refusal(load_audio, tmp_path / "clip").reason == reason
    if reason != "clip silent":
        assert refusal(count_samples, tmp_path / "clip").reason == reason


def test_other_files_are_not_taken_for_sound(tmp_path):
    FLAC(tmp_path / "heard.flac", seconds=1)
    contents = {
        "playlist": b"#EXTM3U\n#EXTINF:1,\nheard.flac\n#EXT-X-ENDLIST\n",
        "list of files": b"ffconcat version 1.0\nfile heard.flac\n",
        "page": b"<!DOCTYPE html><html><body>not found</body></html>",
        "noise": np.random.default_rng(0).bytes(50_000),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert refusal(count_samples, tmp_path / name).reason == "clip is no audio file"
    with av.open(str(tmp_path / "film"), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert refusal(count_samples, tmp_path / "film").reason == "clip is no audio file"


def test_real_clips(shared):
    clips = sorted((shared / "data").glob("*/*.wav"))
    assert clips
    for clip in clips:
        audio = load_audio(clip)
        assert len(audio) == count_samples(clip)
        assert 9.9 < len(audio) / SAMPLE_RATE < 10.1 and np.abs(audio).max() > 0.01
