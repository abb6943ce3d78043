"""Decoding: the content decides, not the name; 16 kHz mono float32 comes out, or an error that names the file."""

import numpy as np
import pytest
import soundfile

from conftest import write_tone
from dataset.audio import SAMPLE_RATE, count_samples, load_audio

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


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("gone.wav", None, FileNotFoundError, "no such audio file"),
        ("empty.wav", b"", ValueError, "not an audio file"),
        ("text.wav", b"RIFF is a name", ValueError, "not an audio file"),
    ],
)
def test_files_without_audio_are_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for read in (load_audio, count_samples):
        with pytest.raises(error, match=f"{name}: .*{message}"):
            read(tmp_path / name)


def test_folder_no_samples_and_not_a_number(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load_audio(tmp_path)
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    for read in (load_audio, count_samples):
        with pytest.raises(ValueError, match="none.wav: the audio holds no samples"):
            read(tmp_path / "none.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan, 0], np.float32), SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match="nan.wav: the audio holds NaN"):
        load_audio(tmp_path / "nan.wav")


def test_real_clips(shared):
    clips = sorted((shared / "data").glob("*/*.wav"))
    assert clips
    for clip in clips:
        audio = load_audio(clip)
        assert len(audio) == count_samples(clip)
        assert 9.9 < len(audio) / SAMPLE_RATE < 10.1 and np.abs(audio).max() > 0.01
