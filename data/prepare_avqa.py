"""AVQA's own annotations and the clips that can be had -> the training file.

    python data/prepare_avqa.py --annotations train_qa.json --media DIR --out data/AVQA/train_qa.data

    data/AVQA/train_qa.data             a row for each question whose clip is there
    data/AVQA/train_qa.dropped.jsonl    the others: id, video_name, reason, message
    data/AVQA/wavs/                     converted clips: 16 kHz mono 16-bit wav, ID_START.wav

DIR, with its folders, holds wavs or videos named ID_START (`-HG3Omg_89c_000030.mp4`, `-HG3Omg_89c_30.wav`) or, where
they are whole videos, ID; what follows the first dot does not matter. A file that libsndfile reads and that is no
longer than the clip is used where it lies. The sound of any other is decoded with PyAV, which brings its own decoder;
of a file longer than the clip, [START, START + 10 s] is taken.

With --download, yt-dlp fetches the sound of missing clips, one video at a time; videos that are gone are recorded in
DIR/gone.jsonl and not requested again. An interrupted run resumes when it is started again. `src/run/check.py` checks
what needs a model's processor, such as the prompt's length.
"""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import av
import numpy as np
import soundfile
from tqdm import tqdm

from dataset.audio import CHANNELS, SAMPLE_RATE, count_samples, open_sound, resample
from dataset.dataset import check_choices, to_row
from dataset.encode import MIN_SECONDS
from dataset.prompt import DEFAULT_STYLE
from dataset.rows import DataError, read_json, read_records
from evaluation.files import write_whole
from utils.flags import at_least

CLIP_SECONDS = 10
SLACK_SECONDS = 1.0  # files a little longer than the clip are the clip: real ones last 10.008 s
CUT_SECONDS = 0.5  # a video may promise this much more sound than it holds
RELATIONS = ("View", "Sound", "Both")
NAME = re.compile(r"([\w-]{11})_0*(\d{1,6})", re.ASCII)
VIDEO_ID = re.compile(r"[\w-]{11}", re.ASCII)
UNFINISHED = re.compile(r"\.part|\.ytdl$|\.tmp$")
TO_DECODE = ("clip is no audio file", "longer than the clip")  # what PyAV may make a clip of
INLINE = 32  # clips up to which worker processes would take longer to start than to help

# yt-dlp's messages for too many requests, and for a video that is gone for good.
REFUSED = re.compile(r"not a bot|rate-limited|try again later|HTTP Error 429|Too Many Requests", re.IGNORECASE)
GONE = re.compile(
    r"video (is )?(unavailable|not available|no longer available)|private video|been removed|been terminated"
    r"|isn.t available|not made this video available|confirm your age|age-restricted|members-only|does not exist",
    re.IGNORECASE,
)
MAX_FAILURES = 5  # in a row, after which the network is taken to be down

Clip = tuple[str, int]  # YouTube id, start in s


@dataclass
class Ledger:
    """Counts of the rows of the annotations."""

    read: int = 0
    left_out: int = 0  # by --relation
    written: int = 0
    dropped: list[dict] = field(default_factory=list)  # id, video_name, reason, message

    def drop(self, row: dict, error: DataError) -> None:
        names = {key: row.get(key) for key in ("id", "video_name")}
        self.dropped.append(names | {"reason": error.reason, "message": str(error)})

    def __str__(self) -> str:
        lines = [f"{self.read:>8}  rows read"]
        if self.left_out:
            lines.append(f"{self.left_out:>8}  of another question_relation (--relation)")
        lines.append(f"{self.written:>8}  written")
        lines.append(f"{len(self.dropped):>8}  dropped")
        for reason, count in Counter(row["reason"] for row in self.dropped).most_common():
            lines.append(f"{count:>12}  {reason}")
        return "\n".join(lines)


def parse_name(name: str) -> Clip | None:
    """Id and start of a clip's name; None if it is none.

    >>> parse_name("-HG3Omg_89c_000030"), parse_name("-HG3Omg_89c_30.mp4")
    (('-HG3Omg_89c', 30), ('-HG3Omg_89c', 30))
    """
    match = NAME.fullmatch(name.partition(".")[0])
    return (match[1], int(match[2])) if match else None


def index_media(folder: Path) -> dict[Clip | str, list[str]]:
    """The files below `folder` by the clip, or the id of the whole video, that their names say; links are followed.

    Raises:
        ValueError: it is no folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; --media names the one with AVQA's wavs or videos")
    found, seen = defaultdict(list), set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # links that lead in a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            stem = name.partition(".")[0]
            key = parse_name(name) or (stem if VIDEO_ID.fullmatch(stem) else None)
            if key and not UNFINISHED.search(name):
                found[key].append(os.path.join(place, name))
    return {key: sorted(paths) for key, paths in found.items()}


# One clip


def find_clip(clip: Clip, candidates: list[str], wavs: Path, channels: str) -> str | DataError:
    """The path of a clip's audio file, converted if needed; or the first error of its `candidates`."""
    made = wavs / f"{clip[0]}_{clip[1]}.wav"
    if made.is_file() and isinstance(_is_the_clip(str(made)), str):
        return str(made)
    errors = []
    for path in candidates:
        if isinstance(found := _is_the_clip(path), str):
            return found
        if found.reason not in TO_DECODE:
            errors.append(found)
            continue
        try:
            write_wav(made, extract(path, clip[1], channels))
            return str(made)
        except DataError as error:
            errors.append(error)
    return errors[0] if errors else DataError("no file in --media is named after it", "clip not found")


def _is_the_clip(path: str) -> str | DataError:
    """`path` itself if it can be used without conversion."""
    try:
        if (file := open_sound(path)) is None:  # as a video, whose sound is taken out once, not at every step
            return DataError(f"{path}: not an audio file that libsndfile can read", "clip is no audio file")
        file.close()
        samples = count_samples(path)
    except DataError as error:
        return error
    if samples > (CLIP_SECONDS + SLACK_SECONDS) * SAMPLE_RATE:
        return DataError(f"{path}: longer than the clip", "longer than the clip")
    if samples < MIN_SECONDS * SAMPLE_RATE:
        return DataError(f"{path}: lasts under {MIN_SECONDS} s; fetch it again", "clip too short")
    return path


def extract(path: str, start: int, channels: str = "first") -> np.ndarray:
    """Decode the sound of a clip from a video or audio file.

    Args:
        path: of any format that FFmpeg reads; where it is longer than the clip, the clip is [start, start + 10 s].
        start: s.
        channels: `first` or `mean`, as in `load_audio`.

    Returns:
        float32 array of shape (samples,), 16 kHz.

    Raises:
        DataError: it cannot be decoded, has no sound, was cut off, or ends before the clip starts.
    """
    try:
        with av.open(path, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise DataError(f"{path}: has no sound; fetch another copy", "video without sound")
            stream = container.streams.audio[0]
            seconds = _duration(container, stream)
            begin = start if seconds > CLIP_SECONDS + SLACK_SECONDS else 0
            if begin and begin + MIN_SECONDS > seconds:
                message = f"{path}: lasts {seconds:.1f} s, but the clip starts at {start} s; fetch another copy"
                raise DataError(message, "video ends before the clip")
            mono, rate = _decode_sound(container, stream, begin, channels)
    except DataError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); fetch it again", "clip cannot be decoded") from error
    if not np.isfinite(mono).all():
        raise DataError(f"{path}: holds NaN or infinite samples; fetch it again", "clip with NaN or infinite samples")
    expected = min(seconds - begin, CLIP_SECONDS)
    if len(mono) < (expected - CUT_SECONDS) * rate or len(mono) < MIN_SECONDS * rate:
        message = f"{path}: was cut off, {len(mono) / rate:.2f} s of {expected:.2f} s are there; fetch it again"
        raise DataError(message, "clip cut off")
    return resample(mono, rate)


def _duration(container, stream) -> float:
    """In s, as the file says; 0 if it does not."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _decode_sound(container, stream, begin: int, channels: str) -> tuple[np.ndarray, int]:
    """Samples [begin, begin + 10 s) of one channel, float32, at their own rate, and that rate in Hz."""
    if begin > 1:
        container.seek((begin - 1) * av.time_base)  # to a place before it, from which decoding settles
    planar = av.AudioResampler(format="fltp")  # keeps rate and channels
    parts, position, rate = [], None, SAMPLE_RATE  # position: of the next sample, counted from `begin`
    for frame in container.decode(stream):
        if position is None:
            rate = frame.sample_rate  # the stream's may be half of it, for HE-AAC
            position = round(((frame.time or 0) - begin) * rate)
        for part in planar.resample(frame):
            samples = part.to_ndarray()  # (channels, samples)
            mono = samples[0] if channels == "first" else samples.mean(axis=0)
            parts.append(mono[max(0, -position) :])
            position += len(mono)
        if position >= CLIP_SECONDS * rate:
            break
    mono = np.concatenate(parts)[: CLIP_SECONDS * rate] if parts else np.zeros(0, np.float32)
    return mono, rate


def write_wav(path: Path, audio: np.ndarray) -> None:
    """Write 16 kHz 16-bit wav; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    soundfile.write(unfinished, audio, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    unfinished.replace(path)


def find_clips(
    clips: list[Clip], media: dict[Clip | str, list[str]], wavs: Path, channels: str, workers: int
) -> dict[Clip, str | DataError]:
    """`find_clip` for many, in `workers` processes (0: in this one), with a progress bar."""
    tasks = [(clip, _readable_first(media.get(clip, []) + media.get(clip[0], []))) for clip in clips]
    find = partial(_find_task, wavs=wavs, channels=channels)
    with _pool(workers if len(tasks) > INLINE else 0) as run:
        found = tqdm(run(find, tasks), total=len(tasks), unit=" clips", desc="clips", disable=None)
        return dict(zip(clips, found, strict=True))


def _find_task(task: tuple[Clip, list[str]], wavs: Path, channels: str) -> str | DataError:
    return find_clip(*task, wavs, channels)


def _readable_first(paths: list[str]) -> list[str]:
    return sorted(paths, key=lambda path: not path.lower().endswith((".wav", ".flac")))


@contextmanager
def _pool(workers: int) -> Iterator:
    """`map`, in `workers` processes if there are any."""
    if not workers:
        yield map
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield partial(pool.map, chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


# Download


def download_missing(clips: list[Clip], folder: Path, wavs: Path, channels: str) -> None:
    """Fetch the sound of each clip's video with yt-dlp, take the clips out of it, and delete it again.

    Args:
        clips: those that are missing.
        folder: for what is being fetched, and for gone.jsonl.

    Raises:
        ValueError: there is no yt-dlp.
    """
    command = find_yt_dlp()
    gone_file, partial_folder = folder / "gone.jsonl", folder / "unfinished"
    gone = {record.get("id") for record in read_records(gone_file)} if gone_file.is_file() else set()
    starts = defaultdict(list)
    for video_id, start in clips:
        if video_id not in gone:
            starts[video_id].append(start)

    def record_gone(video_id: str, message: str) -> None:
        with open(gone_file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"id": video_id, "message": message}) + "\n")

    failures = 0
    bar = tqdm(starts.items(), unit=" videos", desc="download", disable=None)
    for video_id, wanted in bar:
        path, message = fetch(command, video_id, partial_folder)
        if path:
            failures = 0
            for start in wanted:
                try:
                    write_wav(wavs / f"{video_id}_{start}.wav", extract(path, start, channels))
                except DataError as error:
                    record_gone(video_id, str(error))
            os.unlink(path)
        elif REFUSED.search(message):
            bar.write(f"no further requests for now, start again later: {message}")
            break
        elif GONE.search(message):
            record_gone(video_id, message)
        else:
            bar.write(f"{video_id}: {message}")
            failures += 1
            if failures == MAX_FAILURES:
                bar.write(f"{failures} downloads failed in a row; start again when the network is back")
                break


def find_yt_dlp() -> list[str]:
    """The command that starts yt-dlp."""
    if command := shutil.which("yt-dlp"):
        return [command]
    if importlib.util.find_spec("yt_dlp"):
        return [sys.executable, "-m", "yt_dlp"]
    raise ValueError("--download needs yt-dlp, which is not installed: python -m pip install yt-dlp")


def fetch(command: list[str], video_id: str, folder: Path) -> tuple[str | None, str]:
    """Download the best sound of a video: (path, "") or (None, what yt-dlp said last).

    Resumes an interrupted download; yt-dlp waits a few seconds before each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--format", "bestaudio/best", "--no-playlist", "--no-progress", "--retries", "3", "--continue"]
    options += ["--sleep-requests", "1", "--sleep-interval", "2", "--max-sleep-interval", "6"]
    options += ["--output", "%(id)s.%(ext)s", f"https://www.youtube.com/watch?v={video_id}"]
    process = subprocess.run(
        [*command, *options],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    files = [p for p in folder.iterdir() if p.name.partition(".")[0] == video_id and not UNFINISHED.search(p.name)]
    if process.returncode == 0 and files:
        return str(files[0]), ""
    said = [line for line in process.stdout.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")]
    return None, (errors or said or [f"yt-dlp ended with status {process.returncode} and without a file"])[-1]


# Annotations -> training file


def read_annotations(path: Path) -> list:
    """AVQA's list of questions.

    Raises:
        ValueError: there is no such file, or it is not a JSON list in UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; data/README.md says where AVQA's annotations are")
    rows = read_json(path, "fetch AVQA's annotations again")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a JSON {type(rows).__name__}, not AVQA's list of questions")
    return rows


def check_annotation(row, number: int) -> tuple[dict, Clip]:
    """A row of the annotations as a training row that lacks its clip's path, and the clip; or a `DataError`."""
    if not isinstance(row, dict):
        raise DataError(f"row {number} is a JSON {type(row).__name__}, not an object", "not a JSON object")
    record = row | {"dataset_name": "AVQA"}
    to_row(record | {"audio_path": "x"}, number, DEFAULT_STYLE, Path())
    check_choices(record["question_text"], record["multi_choice"], "multi_choice")
    clip = parse_name(name) if isinstance(name := row.get("video_name"), str) else None
    if clip is None:
        message = f"`video_name` is {name!r:.80}; an 11-character YouTube id, _ and the start in seconds are needed"
        raise DataError(message, "`video_name` not understood")
    return record, clip


def prepare(args: Namespace) -> Ledger:
    """Write the training file and the dropped rows.

    Raises:
        ValueError: an input cannot be read, or no row is left; writes no training file then.
    """
    media_folder, out = Path(args.media), Path(args.out)
    if args.download:
        find_yt_dlp()
        media_folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger()
    rows = list(select_rows(read_annotations(Path(args.annotations)), args.relation, ledger))

    wavs = out.absolute().parent / "wavs"
    clips = list(dict.fromkeys(clip for _, clip in rows))
    found = find_clips(clips, index_media(media_folder), wavs, args.audio_channels, args.workers)
    missing = [clip for clip, path in found.items() if isinstance(path, DataError)]
    if args.download and missing:
        download_missing(missing, media_folder, wavs, args.audio_channels)
        found |= find_clips(missing, index_media(media_folder), wavs, args.audio_channels, args.workers)

    lines = []
    for record, clip in rows:
        if isinstance(path := found[clip], DataError):
            ledger.drop(record, path)
        else:
            lines.append(json.dumps(record | {"audio_path": _relative(path, out)}) + "\n")
    ledger.written = len(lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out.with_suffix(".dropped.jsonl"), "".join(json.dumps(row) + "\n" for row in ledger.dropped))
    if not lines:
        raise ValueError(f"no row is left of {args.annotations}; {out} was not written\n{ledger}")
    write_whole(out, "".join(lines))
    return ledger


def select_rows(rows: list, relations: list[str] | None, ledger: Ledger) -> Iterator[tuple[dict, Clip]]:
    """Yield the training row (without `audio_path`) and the clip of every good row about one of `relations`."""
    for number, row in enumerate(rows, start=1):
        ledger.read += 1
        if relations and isinstance(row, dict) and row.get("question_relation") not in relations:
            ledger.left_out += 1
            continue
        try:
            yield check_annotation(row, number)
        except DataError as error:
            ledger.drop(row if isinstance(row, dict) else {}, error)


def _relative(path: str, out: Path) -> str:
    """`path` relative to the training file's folder if it is below it, so that both can be moved together."""
    path, folder = os.path.abspath(path), os.path.abspath(out.parent)
    return os.path.relpath(path, folder) if os.path.commonpath([path, folder]) == folder else path


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description="Turn AVQA's annotations and clips into the training file.", allow_abbrev=False)
    add = parser.add_argument
    add("--annotations", required=True, help="AVQA's train_qa.json or val_qa.json")
    add("--media", required=True, help="folder with wavs or videos, searched with its folders")
    add("--out", default="data/AVQA/train_qa.data", help="the training file")
    add("--relation", nargs="+", choices=RELATIONS, help="keep only questions about these; default: all")
    add("--audio_channels", choices=CHANNELS, default="first", help="channel(s) to take out of videos; paper: first")
    add("--download", action="store_true", help="fetch what is missing with yt-dlp; may take days")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--workers", type=at_least(0), default=cores, help="processes; default: one per core; 0: this one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        ledger = prepare(args)
    except (ValueError, OSError) as error:
        print(f"prepare_avqa.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_avqa.py: interrupted; start it again to resume", file=sys.stderr)
        return 130
    print(ledger)
    print(f"{args.out}; what was dropped: {Path(args.out).with_suffix('.dropped.jsonl')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
