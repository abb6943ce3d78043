"""prepare_avqa.py: real clips and videos, names in every form, what is dropped and why, stopping and starting again,
downloads by a stand-in for yt-dlp."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

import prepare_avqa
from conftest import ROOT, write_tone
from dataset.audio import SAMPLE_RATE, load_audio
from dataset.dataset import load_train_dataset
from prepare_avqa import DataError, extract, index_media, main, parse_name
from run.check import Rules, examine_training_file
from running import run

ROW = {
    "id": 183, "video_name": "-HG3Omg_89c_000030", "video_id": 341, "question_text": "What happened in the video?",
    "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"], "answer": 1,
    "question_relation": "View", "question_type": "Happening",
}  # fmt: skip


def write_annotations(folder: Path, *rows) -> Path:
    path = folder / "train_qa.json"
    path.write_text(json.dumps(rows))
    return path


def named(*names: str) -> list[dict]:
    return [ROW | {"id": i, "video_name": name} for i, name in enumerate(names)]


def prepare(folder: Path, rows: list, *flags: str, media: Path | None = None) -> int:
    """Run the command in this process, with `folder`/media, `folder`/out/train_qa.data; its exit status."""
    (folder / "media").mkdir(exist_ok=True)
    annotations = write_annotations(folder, *rows)
    out = str(folder / "out" / "train_qa.data")
    where = ["--annotations", str(annotations), "--media", str(media or folder / "media"), "--out", out]
    return main([*where, "--workers", "0", *flags])


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "train_qa.data").read_text().splitlines()]


def dropped(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "train_qa.dropped.jsonl").read_text().splitlines()]


def write_steps(path: Path, seconds: int, format: str = "WAV", channels: int = 1) -> None:
    """A sound whose pitch tells the second it is in: 300 Hz, 320 Hz, ...; a second channel is 2000 Hz higher."""
    time = np.arange(seconds * 16_000) / 16_000
    tones = [0.3 * np.sin(2 * np.pi * (300 + 20 * np.floor(time) + 2000 * i) * time) for i in range(channels)]
    samples = np.stack(tones, axis=1).astype(np.float32)
    if format == "WAV":
        soundfile.write(path, samples, 16_000, format="WAV")
        return
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream("aac", rate=16_000, layout="stereo" if channels == 2 else "mono")
        for start in range(0, len(samples), 16_000):
            part = np.ascontiguousarray(samples[start : start + 16_000].T)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=stream.layout.name)
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def pitches(audio: np.ndarray) -> list[int]:
    """Hz in the middle of each second."""
    middles = [audio[start + 4_000 : start + 12_000] for start in range(0, len(audio) - 12_000, 16_000)]
    return [round(np.abs(np.fft.rfft(part)).argmax() * 2 / 20) * 20 for part in middles]


# Names


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("-HG3Omg_89c_000030", ("-HG3Omg_89c", 30)),
        ("-HG3Omg_89c_30", ("-HG3Omg_89c", 30)),
        ("-HG3Omg_89c_000030.mp4", ("-HG3Omg_89c", 30)),
        ("-HG3Omg_89c_30.wav", ("-HG3Omg_89c", 30)),
        ("-HG3Omg_89c_30.mp4.wav", ("-HG3Omg_89c", 30)),
        ("-HG3Omg_89c_0", ("-HG3Omg_89c", 0)),
        ("-HG3Omg_89c_000000", ("-HG3Omg_89c", 0)),
        ("___________100000", None),
        ("____________100000", ("___________", 100_000)),
        ("0-00uubi_NU_7_000210", None),
        ("-HG3Omg_89c", None),
        ("-HG3Omg_89c_3o", None),
        ("-HG3Omg_89c_٣", None),
        ("train_qa", None),
        ("", None),
    ],
)
def test_names(name, clip):
    assert parse_name(name) == clip


def test_all_real_names_are_understood(shared):
    names = list(json.loads((shared / "data" / "avqa" / "video_map.json").read_text()))
    clips = [parse_name(name) for name in names]
    assert len(names) == 99_502 and [f"{video}_{start:06}" for video, start in clips] == names
    assert [parse_name(f"{video}_{start}.wav") for video, start in clips] == clips


def test_files_are_found_in_every_form(tmp_path):
    for name in (
        "a/-HG3Omg_89c_000030.mp4",
        "a/b/-HG3Omg_89c_30.wav",
        "__________-_7.webm",
        "abcdefghijk.mkv",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in (
        "-HG3Omg_89c_40.m4a.part",
        "-HG3Omg_89c_50.wav.123.tmp",
        "abcdefghijk.webm.part-Frag7",
        "abcdefghijk.ytdl",
    ):
        (tmp_path / name).touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    found = index_media(tmp_path)
    assert found == {
        ("-HG3Omg_89c", 30): [str(tmp_path / "a/-HG3Omg_89c_000030.mp4"), str(tmp_path / "a/b/-HG3Omg_89c_30.wav")],
        ("__________-", 7): [str(tmp_path / "__________-_7.webm")],
        "abcdefghijk": [str(tmp_path / "abcdefghijk.mkv")],
    }
    with pytest.raises(ValueError, match="--media"):
        index_media(tmp_path / "gone")


# Real clips


def test_real_wavs_are_used_where_they_lie(shared, tmp_path, capsys):
    wavs = sorted((shared / "data" / "avqa").glob("*.wav"))
    assert prepare(tmp_path, named(*(path.stem for path in wavs)), media=shared / "data" / "avqa") == 0
    assert [row["audio_path"] for row in written(tmp_path)] == [str(path) for path in wavs]
    assert written(tmp_path)[0] == named(wavs[0].stem)[0] | {"dataset_name": "AVQA", "audio_path": str(wavs[0])}
    assert dropped(tmp_path) == [] and not (tmp_path / "out" / "wavs").exists()
    assert not examine_training_file(tmp_path / "out" / "train_qa.data", Rules(deep=True)).dropped
    assert f"{len(wavs):>8}  written" in capsys.readouterr().out


def test_real_videos_give_the_sound_of_their_wavs(shared, tmp_path):
    videos = sorted((shared / "data" / "avqa").glob("*.mp4"))
    (tmp_path / "media").mkdir()
    for video in videos:
        video_id, start = parse_name(video.name)
        (tmp_path / "media" / f"{video_id}_{start}.mp4").symlink_to(video)
    assert videos and prepare(tmp_path, named(*(path.stem for path in videos))) == 0
    for row, video in zip(written(tmp_path), videos, strict=True):
        video_id, start = parse_name(video.name)
        assert row["audio_path"] == f"wavs/{video_id}_{start}.wav", "relative, so that the folder can be moved"
        made = tmp_path / "out" / row["audio_path"]
        info = soundfile.info(made)
        assert (info.samplerate, info.channels, info.subtype, info.duration) == (16_000, 1, "PCM_16", 10.0)
        audio, real = load_audio(made), load_audio(video.with_suffix(".wav"))
        assert np.corrcoef(audio, real[: len(audio)])[0, 1] > 0.9999
    paths = load_train_dataset(tmp_path / "out" / "train_qa.data")["audio_path"][:]
    assert all(Path(path).is_file() for path in paths)


# What is made of a file


@pytest.mark.parametrize("format", ["WAV", "mp4", "matroska", "adts"])
@pytest.mark.parametrize(("start", "seconds", "length"), [(0, 30, 10), (7, 30, 10), (30, 45, 10), (30, 34, 4)])
def test_a_longer_file_is_cut(tmp_path, format, start, seconds, length):
    write_steps(tmp_path / "video", seconds, format)
    audio = extract(str(tmp_path / "video"), start)
    assert len(audio) / SAMPLE_RATE == pytest.approx(length, abs=0.15) and audio.dtype == np.float32
    assert pitches(audio)[: length - 1] == [300 + 20 * (start + i) for i in range(length)][: length - 1]


@pytest.mark.parametrize("seconds", [4, 10])
def test_a_file_of_the_clips_length_is_the_clip(tmp_path, seconds):
    write_steps(tmp_path / "clip.mp4", seconds, "mp4")
    audio = extract(str(tmp_path / "clip.mp4"), start=30)
    assert pitches(audio)[0] == 300 and len(audio) / SAMPLE_RATE == pytest.approx(min(seconds, 10), abs=0.1)


def test_channels(tmp_path):
    write_steps(tmp_path / "clip.mp4", 10, "mp4", channels=2)
    assert pitches(extract(str(tmp_path / "clip.mp4"), 0))[0] == 300
    spectrum = np.abs(np.fft.rfft(extract(str(tmp_path / "clip.mp4"), 0, "mean")[4_000:12_000]))
    assert spectrum[150] > 300 and spectrum[1150] > 300, "300 and 2300 Hz"


def test_the_whole_video_serves_all_of_its_clips(tmp_path):
    (tmp_path / "media").mkdir()
    write_steps(tmp_path / "media" / "-HG3Omg_89c.mkv", 45, "matroska")
    assert prepare(tmp_path, named("-HG3Omg_89c_000030", "-HG3Omg_89c_000005", "-HG3Omg_89c_000030")) == 0
    first, second, third = [row["audio_path"] for row in written(tmp_path)]
    assert first == third == "wavs/-HG3Omg_89c_30.wav"
    assert pitches(load_audio(tmp_path / "out" / first))[0] == 900
    assert pitches(load_audio(tmp_path / "out" / second))[0] == 400


def test_a_bad_copy_gives_way_to_a_good_one(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "-HG3Omg_89c_30.wav").write_text("no audio")
    write_tone(tmp_path / "media" / "-HG3Omg_89c_000030.wav", 10.0)
    content = (tmp_path / "media" / "-HG3Omg_89c_000030.wav").read_bytes()
    (tmp_path / "media" / "abcdefghijk_30.wav").write_bytes(content[: len(content) // 2])
    write_steps(tmp_path / "media" / "abcdefghijk_30.mp4", 10, "mp4")
    assert prepare(tmp_path, named("-HG3Omg_89c_000030", "abcdefghijk_000030")) == 0
    assert [row["audio_path"] for row in written(tmp_path)] == [
        str(tmp_path / "media" / "-HG3Omg_89c_000030.wav"),
        "wavs/abcdefghijk_30.wav",
    ]


def write_silent_film(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))


def write_cut(path: Path, format: str) -> None:
    write_steps(path, 10, format)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_MEDIA = {
    "nothing": (lambda path: None, "clip not found"),
    "empty": (lambda path: path.touch(), "clip cannot be decoded"),
    "folder": (lambda path: path.mkdir(), "clip not found"),
    "text": (lambda path: path.write_text("<html>not found</html>" * 99), "clip cannot be decoded"),
    "silent film": (write_silent_film, "video without sound"),
    "cut video": (lambda path: write_cut(path, "mp4"), "clip cannot be decoded"),
    "cut Matroska": (lambda path: write_cut(path, "matroska"), "clip cut off"),
    "cut wav": (lambda path: write_cut(path, "WAV"), "clip cut off"),
    "short wav": (lambda path: write_tone(path, 0.05, format="WAV"), "clip too short"),
    "another video": (lambda path: write_steps(path, 20, "mp4"), "video ends before the clip"),
}


@pytest.mark.parametrize("name", BAD_MEDIA)
def test_bad_media_are_dropped_and_named(tmp_path, name):
    make, reason = BAD_MEDIA[name]
    (tmp_path / "media").mkdir()
    make(tmp_path / "media" / "-HG3Omg_89c_30.mp4")
    write_tone(tmp_path / "media" / "abcdefghijk_7.wav", 10.0)
    assert prepare(tmp_path, named("-HG3Omg_89c_000030", "abcdefghijk_000007")) == 0
    (entry,) = dropped(tmp_path)
    assert (entry["id"], entry["video_name"], entry["reason"]) == (0, "-HG3Omg_89c_000030", reason)
    assert len(written(tmp_path)) == 1
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_samples_that_are_not_numbers_are_dropped(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.full(12 * 22_050, np.nan, np.float32), 22_050, subtype="FLOAT")
    with pytest.raises(DataError) as error:
        extract(str(path), start=0)
    assert error.value.reason == "clip with NaN or infinite samples"


def test_bad_annotations_are_dropped_and_named(tmp_path, capsys):
    (tmp_path / "media").mkdir()
    write_tone(tmp_path / "media" / "-HG3Omg_89c_30.wav", 10.0)
    rows = [ROW, 5, ROW | {"answer": 4}, ROW | {"answer": True}, ROW | {"multi_choice": ["one"], "answer": 0}]
    rows += [ROW | {"question_text": " "}, ROW | {"video_name": "notAvideo"}, ROW | {"video_name": None}]
    assert prepare(tmp_path, rows) == 0
    assert len(written(tmp_path)) == 1 and [entry["reason"] for entry in dropped(tmp_path)] == [
        "not a JSON object", "`answer` out of range", "`answer` of the wrong type", "fewer than two choices",
        "question empty", "`video_name` not understood", "`video_name` not understood",
    ]  # fmt: skip
    ledger = capsys.readouterr().out.splitlines()
    assert ledger[:3] == ["       8  rows read", "       1  written", "       7  dropped"]
    assert "           2  `video_name` not understood" in ledger


def test_relation(tmp_path, capsys):
    (tmp_path / "media").mkdir()
    write_tone(tmp_path / "media" / "-HG3Omg_89c_30.wav", 10.0)
    rows = [ROW | {"id": kind, "question_relation": kind} for kind in ("View", "Sound", "Both", "Sound")]
    assert prepare(tmp_path, rows, "--relation", "Sound", "Both") == 0
    assert [row["id"] for row in written(tmp_path)] == ["Sound", "Both", "Sound"]
    assert "       1  of another question_relation (--relation)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prepare(tmp_path, rows, "--relation", "sound")


def test_no_row_left_is_an_error(tmp_path, capsys):
    assert prepare(tmp_path, named("-HG3Omg_89c_000030")) == 1
    error = capsys.readouterr().err
    assert "clip not found" in error
    assert not (tmp_path / "out" / "train_qa.data").exists() and len(dropped(tmp_path)) == 1


@pytest.mark.parametrize("content", [None, "{", '{"a": 1}', "[]"])
def test_what_is_no_annotation_file(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    out = tmp_path / "out.data"
    assert main(["--annotations", str(tmp_path / "a.json"), "--media", str(tmp_path), "--out", str(out)]) == 1
    assert "a.json" in capsys.readouterr().err and not out.exists()


# Stopping and starting again


def test_a_second_run_makes_nothing_again_and_mends_what_is_damaged(tmp_path):
    (tmp_path / "media").mkdir()
    names = [f"abcdefghij{i}_000000" for i in range(3)]
    for name in names:
        write_steps(tmp_path / "media" / f"{name}.mp4", 10, "mp4")
    assert prepare(tmp_path, named(*names)) == 0
    wavs = sorted((tmp_path / "out" / "wavs").iterdir())
    good = wavs[1].read_bytes()
    wavs[1].write_bytes(good[:50_000])
    before = [path.stat().st_mtime_ns for path in wavs]
    assert prepare(tmp_path, named(*names)) == 0
    after = [path.stat().st_mtime_ns for path in wavs]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True] and wavs[1].read_bytes() == good


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path):
    """Real processes, a real interrupt while they work."""
    (tmp_path / "media").mkdir()
    write_steps(tmp_path / "video.mp4", 60, "mp4")
    names = [f"abcdefgh{i:03}_000040" for i in range(200)]
    for name in names:
        os.link(tmp_path / "video.mp4", tmp_path / "media" / f"{name}.mp4")
    annotations, out = write_annotations(tmp_path, *named(*names)), tmp_path / "out" / "train_qa.data"
    command = [
        sys.executable,
        "data/prepare_avqa.py",
        "--annotations",
        annotations,
        "--media",
        tmp_path / "media",
        "--out",
        out,
    ]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that are run in the background inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(list(out.parent.glob("wavs/*.wav"))) < 10 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    done = len(list(out.parent.glob("wavs/*.wav")))
    assert process.returncode == 130 and "Traceback" not in error and 10 <= done < 200
    assert not out.exists()
    assert "     200  written" in run(*command, "--workers", "2").stdout
    assert all(soundfile.info(path).duration == 10.0 for path in out.parent.glob("wavs/*.wav"))


MEASURED = """
import json, re, sys, time
from pathlib import Path
sys.path.insert(0, "data")
import prepare_avqa
start = time.perf_counter()
status = prepare_avqa.main(sys.argv[1:])
seconds = time.perf_counter() - start
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps([status, seconds, int(peak[1]) / 1024]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.slow
def test_forty_thousand_rows(tmp_path, shared, capsys):
    """Annotations made from the real names; a clip for every other one, in the forms that are around."""
    names = list(json.loads((shared / "data" / "avqa" / "video_map.json").read_text()))[:40_000]
    (tmp_path / "media").mkdir()
    write_tone(tmp_path / "clip", 10.0, format="WAV")
    for i, name in enumerate(names[::2]):
        video_id, start = parse_name(name)
        os.link(tmp_path / "clip", tmp_path / "media" / (f"{video_id}_{start}.wav" if i % 2 else f"{name}.flac"))
    annotations, out = write_annotations(tmp_path, *named(*names)), tmp_path / "out" / "train_qa.data"
    flags = ["--annotations", annotations, "--media", tmp_path / "media", "--out", out, "--workers", 2]
    status, seconds, mebibytes = json.loads(run(sys.executable, "-c", MEASURED, *flags).stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n40,000 rows of AVQA, 20,000 clips: {seconds:.1f} s, {mebibytes:.0f} MiB at the peak")
    assert status == 0 and len(written(tmp_path)) == len(dropped(tmp_path)) == 20_000
    assert [row["video_name"] for row in written(tmp_path)] == names[::2]
    assert seconds < 120 and mebibytes < 600


# Downloads, by a stand-in for yt-dlp that has three videos and logs what it is asked for

STAND_IN = """#!{python}
import shutil, sys
from pathlib import Path
url = sys.argv[-1]
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
video = url.partition("v=")[2]
here = Path({videos!r}) / video
if here.is_file():
    assert not list(Path().glob(f"{{video}}*.part")) or "--continue" in sys.argv
    shutil.copy(here, f"{{video}}.m4a")
else:
    answers = {answers!r}
    print(f"[youtube] {{video}}: Downloading webpage")
    sys.exit(f"ERROR: [youtube] {{video}}: " + answers[video])
"""

ANSWERS = {
    "gone_video_": "Video unavailable. This video has been removed by the uploader",
    "privatevid_": "Private video. Sign in if you've been granted access to this video",
    "oldversion_": "Requested format is not available. Use --list-formats for a list of available formats",
    "toomanyreq_": "Video unavailable. This content isn't available, try again later. The current session has been "
    "rate-limited by YouTube for up to an hour.",
    "robotquest_": "Sign in to confirm you’re not a bot.",
}


class StandIn:
    def __init__(self, folder: Path):
        self.log, self.videos, self.bin = folder / "asked.log", folder / "youtube", folder / "bin"
        self.videos.mkdir()
        self.bin.mkdir()

    def script(self) -> str:
        return STAND_IN.format(python=sys.executable, log=str(self.log), videos=str(self.videos), answers=ANSWERS)

    def asked(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        self.log.unlink(missing_ok=True)
        return [line.rpartition("v=")[2] for line in lines]


@pytest.fixture
def yt_dlp(tmp_path, monkeypatch) -> StandIn:
    stand_in = StandIn(tmp_path)
    command = stand_in.bin / "yt-dlp"
    command.write_text(stand_in.script())
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(stand_in.bin), prepend=os.pathsep)
    return stand_in


def test_download(tmp_path, yt_dlp):
    write_steps(yt_dlp.videos / "-HG3Omg_89c", 45, "mp4")
    write_steps(yt_dlp.videos / "endstooearly", 20, "mp4")
    (yt_dlp.videos / "endstooearly").rename(yt_dlp.videos / "endsearly__")
    (tmp_path / "media").mkdir()
    write_tone(tmp_path / "media" / "abcdefghijk_7.wav", 10.0)
    videos = ["abcdefghijk_000007", "-HG3Omg_89c_000030", "-HG3Omg_89c_000000", "gone_video__000001"]
    videos += ["privatevid__000001", "oldversion__000001", "endsearly___000030"]
    assert prepare(tmp_path, named(*videos), "--download") == 0
    log = yt_dlp.log.read_text()
    for option in ("--continue", "--sleep-interval", "--sleep-requests", "--no-playlist", "--format bestaudio/best"):
        assert option in log, "polite, resumable, sound only"
    asked = ["-HG3Omg_89c", "gone_video_", "privatevid_", "oldversion_", "endsearly__"]
    assert yt_dlp.asked() == asked, "only what is missing, every video once"
    assert [row["audio_path"] for row in written(tmp_path)] == [
        str(tmp_path / "media" / "abcdefghijk_7.wav"), "wavs/-HG3Omg_89c_30.wav", "wavs/-HG3Omg_89c_0.wav",
    ]  # fmt: skip
    assert pitches(load_audio(tmp_path / "out" / "wavs" / "-HG3Omg_89c_30.wav"))[0] == 900
    gone = [json.loads(line)["id"] for line in (tmp_path / "media" / "gone.jsonl").read_text().splitlines()]
    assert gone == ["gone_video_", "privatevid_", "endsearly__"]
    assert not list((tmp_path / "media" / "unfinished").iterdir()), "the videos themselves are not kept"

    (tmp_path / "media" / "unfinished" / "oldversion_.m4a.part").touch()  # the download was broken off
    write_steps(yt_dlp.videos / "oldversion_", 20, "mp4")
    assert prepare(tmp_path, named(*videos), "--download") == 0
    assert yt_dlp.asked() == ["oldversion_"], "what is gone is not asked for again"
    assert len(written(tmp_path)) == 4


@pytest.mark.parametrize("refusing", ["toomanyreq_", "robotquest_"])
def test_a_refusal_ends_the_download_and_is_no_gone_video(tmp_path, yt_dlp, refusing):
    (tmp_path / "media").mkdir()
    write_tone(tmp_path / "media" / "abcdefghijk_7.wav", 10.0)
    assert prepare(tmp_path, named("abcdefghijk_000007", f"{refusing}_000001", "gone_video__000001"), "--download") == 0
    assert yt_dlp.asked() == [refusing] and not (tmp_path / "media" / "gone.jsonl").exists()


def test_a_network_that_is_down_is_not_asked_for_ever(tmp_path, yt_dlp, monkeypatch):
    monkeypatch.setattr(prepare_avqa, "MAX_FAILURES", 3)
    monkeypatch.setitem(ANSWERS, "x", "")
    names = [f"offline{i:04}_000001" for i in range(9)]
    script = yt_dlp.script().replace("answers[video]", "'Unable to download webpage: timed out'")
    (yt_dlp.bin / "yt-dlp").write_text(script)
    assert prepare(tmp_path, named(*names), "--download") == 1
    assert len(yt_dlp.asked()) == 3 and not (tmp_path / "media" / "gone.jsonl").exists()


def test_yt_dlp_as_a_module(tmp_path):
    """No command on the path, but the package: a real `python -m yt_dlp`."""
    stand_in = StandIn(tmp_path)
    (tmp_path / "packages" / "yt_dlp").mkdir(parents=True)
    (tmp_path / "packages" / "yt_dlp" / "__init__.py").touch()
    (tmp_path / "packages" / "yt_dlp" / "__main__.py").write_text(stand_in.script())
    write_steps(stand_in.videos / "-HG3Omg_89c", 45, "mp4")
    annotations, out = write_annotations(tmp_path, *named("-HG3Omg_89c_000030")), tmp_path / "train_qa.data"
    run(
        sys.executable, "data/prepare_avqa.py", "--annotations", annotations, "--media", tmp_path / "media", "--out", out,
        "--download", PYTHONPATH=tmp_path / "packages",
    )  # fmt: skip
    assert json.loads(out.read_text())["audio_path"] == "wavs/-HG3Omg_89c_30.wav"


def test_without_yt_dlp_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert prepare(tmp_path, named("-HG3Omg_89c_000030"), "--download") == 1
    assert "--download" in capsys.readouterr().err


def test_errors_pass_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(DataError("the message", "the reason")))
    assert (str(error), error.reason) == ("the message", "the reason")
