"""Synthesise the demo's data: short clips (hums, sirens, melodies, voices ...), and question files in the real formats.

    python demo/make_demo.py --out data/demo --seed 1

    data/demo/train.jsonl               questions for GRPO, in AVQA's training format
    data/demo/warm_start.jsonl          the same for the supervised warm start; no clip in common with train.jsonl
    data/demo/wavs/                     the clips of both, 16 kHz mono 16-bit wav
    data/demo/mmau_demo.json            held-out questions, in MMAU's format
    data/demo/test-mini-audios/         their clips
    data/demo/mmau_shifted.json         questions away from the training's, in MMAU's format: other wording, 2 to 8
                                        choices, other rates and loudness, much noise, two sounds that no answer named
    data/demo/shifted-audios/           their clips

Pitch, tempo, loudness, timbre and background noise are random for every clip, so held-out clips differ from training's.
A seed gives the same bytes on the same machine. The folder appears whole or not at all.
"""

import json
import shutil
import sys
import tempfile
import uuid
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from utils.flags import at_least

SAMPLE_RATE = 16_000  # Hz; only the shifted clips need resampling
SHIFTED_RATES = (11_025, 22_050, 32_000, 44_100, 48_000)  # Hz; at 8000 a clock's ticks would be gone
SECONDS = (1.0, 1.9)  # shortest and longest clip; the demo model's window is 2 s

MMAU_FILE = "mmau_demo.json"
SHIFTED_FILE = "mmau_shifted.json"
TRAIN_FILE = "train.jsonl"
WARM_START_FILE = "warm_start.jsonl"

QUESTIONS = (  # AVQA's wording; the loader turns `video` into `audio`
    "What makes the sound in the video?",
    "What is the main source of sound in the video?",
    "What can be heard in the video?",
)
SHIFTED_QUESTIONS = (  # never those of the training
    "Which of these is the recording of?",
    "Name the source of this sound.",
    "Listen closely. What do you hear?",
    "What would one see where this was recorded?",
)


# --- Building blocks. Every signal is a float64 array of shape (samples,), nominally within [-1, 1]. ---


def _time(samples: int) -> np.ndarray:
    return np.arange(samples) / SAMPLE_RATE  # seconds


def _harmonics(frequency: np.ndarray | float, weights: np.ndarray, samples: int) -> np.ndarray:
    """A tone of `frequency` Hz (constant, or one value per sample) and its overtones, each with its weight."""
    turn = np.exp(2j * np.pi / SAMPLE_RATE * np.cumsum(np.broadcast_to(frequency, samples)))
    tone = np.zeros(samples, dtype=complex)
    for weight in weights[::-1]:  # Horner: powers of `turn` are the overtones, for one multiplication each
        tone = (tone + weight) * turn
    return tone.imag / np.abs(weights).sum()


def _noise(rng: np.random.Generator, samples: int, low: float, high: float) -> np.ndarray:
    """Noise of unit variance with energy between `low` and `high` Hz only."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum[(frequency < low) | (frequency > high)] = 0
    noise = np.fft.irfft(spectrum, samples)
    return noise / (noise.std() + 1e-9)


def _strokes(rng: np.random.Generator, samples: int, per_second: tuple[float, float], stroke: Callable) -> np.ndarray:
    """`stroke(rng, index)` -> a short signal, added at regular intervals of a random tempo."""
    period = int(SAMPLE_RATE / rng.uniform(*per_second))
    signal = np.zeros(samples)
    for index, start in enumerate(range(int(rng.integers(period)), samples, period)):
        piece = stroke(rng, index)[: samples - start]
        signal[start : start + len(piece)] += piece
    return signal


def _decay(seconds: float, half_life: float) -> np.ndarray:
    return 0.5 ** (_time(int(seconds * SAMPLE_RATE)) / half_life)


# --- The sounds: (rng, samples) -> signal ---


def engine(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A low hum with many overtones that throbs."""
    pitch = rng.uniform(45, 110) * (1 + rng.uniform(-0.15, 0.15) * _time(samples))
    throb = 1 + 0.4 * np.sin(2 * np.pi * rng.uniform(6, 14) * _time(samples))
    return throb * _harmonics(pitch, rng.uniform(0.5, 1, 8) / np.arange(1, 9) ** 0.5, samples)


def siren(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A tone that sweeps up and down."""
    middle, width, rate = rng.uniform(700, 1300), rng.uniform(0.25, 0.45), rng.uniform(0.8, 2.5)
    sweep = np.sin(2 * np.pi * (rate * _time(samples) + rng.uniform()))
    return _harmonics(middle * (1 + width * sweep), np.array([1, rng.uniform(0.1, 0.5)]), samples)


def rain(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Steady broad noise."""
    return 0.3 * _noise(rng, samples, rng.uniform(200, 1200), rng.uniform(4000, 7500))


def clock(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Dry high ticks."""
    ring = rng.uniform(2200, 4500)

    def tick(rng: np.random.Generator, index: int) -> np.ndarray:
        envelope = _decay(0.04, 0.004)
        return envelope * np.sin(2 * np.pi * ring * (1 + 0.15 * (index % 2)) * _time(len(envelope)))

    return _strokes(rng, samples, (3, 8), tick)


def alarm(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Beeps of one pitch with pauses between them."""
    pitch, length = rng.uniform(900, 2400), rng.uniform(0.06, 0.12)

    def beep(rng: np.random.Generator, index: int) -> np.ndarray:
        time = _time(int(length * SAMPLE_RATE))
        return np.sin(2 * np.pi * pitch * time) * np.minimum(1, 200 * np.minimum(time, length - time))

    return _strokes(rng, samples, (3, 6), beep)


def piano(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A little melody of struck notes that ring off."""
    scale = rng.uniform(220, 440) * 2 ** (np.array([0, 2, 4, 7, 9, 12]) / 12)
    weights = rng.uniform(0.5, 1, 5) / np.arange(1, 6) ** 1.2

    def note(rng: np.random.Generator, index: int) -> np.ndarray:
        envelope = _decay(0.8, rng.uniform(0.08, 0.14))
        return envelope * _harmonics(rng.choice(scale), weights, len(envelope))

    return _strokes(rng, samples, (3, 6), note)


def organ(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A held chord."""
    root = rng.uniform(180, 400)
    third = rng.choice([3, 4])
    weights = np.array([1, rng.uniform(0.3, 0.8), 0, rng.uniform(0.1, 0.5), 0, 0, 0, rng.uniform(0.1, 0.3)])
    notes = (_harmonics(root * 2 ** (step / 12), weights, samples) for step in (0, third, 7))
    return sum(notes, start=np.zeros(samples)) / 2


def drums(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A low drum and a rattling one in turn."""
    low = rng.uniform(60, 110)

    def beat(rng: np.random.Generator, index: int) -> np.ndarray:
        envelope = _decay(0.25, 0.035)
        if index % 2:
            return 0.25 * envelope * _noise(rng, len(envelope), 300, 6000)
        return envelope * np.sin(2 * np.pi * low * (1 + np.exp(-30 * _time(len(envelope)))) * _time(len(envelope)))

    return _strokes(rng, samples, (4, 8), beat)


def flute(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Whistled notes, slurred, with vibrato and a little breath."""
    steps = rng.choice([0, 2, 4, 5, 7], size=8)
    place = (_time(samples) * rng.uniform(2, 4)).astype(int)
    vibrato = 1 + 0.015 * np.sin(2 * np.pi * rng.uniform(4.5, 6.5) * _time(samples))
    pitch = rng.uniform(900, 1500) * 2 ** (steps[place % 8] / 12) * vibrato
    return _harmonics(pitch, np.array([1, 0.15]), samples) + 0.02 * _noise(rng, samples, 1000, 6000)


def _voice(rng: np.random.Generator, samples: int, pitch: tuple[float, float], formant_scale: float) -> np.ndarray:
    """Syllables: overtones of a gliding pitch, weighted by two formants that change from syllable to syllable."""
    vowels = formant_scale * np.array([[730, 1090], [270, 2290], [530, 1840], [570, 840], [300, 870]])  # Hz

    low, high = pitch
    base = rng.uniform(low, high)

    def syllable(rng: np.random.Generator, index: int) -> np.ndarray:
        length = int(rng.uniform(0.14, 0.22) * SAMPLE_RATE)
        glide = base * (1 + rng.uniform(-0.08, 0.08) + np.linspace(0, rng.uniform(-0.15, 0.1), length))
        orders = np.arange(1, int(3500 / base) + 1)
        distance = np.log2(orders[:, None] * base / vowels[rng.integers(len(vowels))])  # octaves, (orders, 2)
        weights = (np.exp(-((distance / 0.25) ** 2)) * np.array([1.0, 0.6])).sum(axis=1) + 0.05
        return np.hanning(length) * _harmonics(glide, weights, length)

    return _strokes(rng, samples, (3.5, 5.5), syllable)


def man(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Babble of a low voice."""
    return _voice(rng, samples, (85, 135), 1.0)


def woman(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Babble of a high voice."""
    return _voice(rng, samples, (190, 280), 1.17)


def bell(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Strokes with overtones that are no multiples of one pitch, and ring on."""
    pitch = rng.uniform(300, 700)

    def stroke(rng: np.random.Generator, index: int) -> np.ndarray:
        envelope = _decay(1.0, rng.uniform(0.12, 0.2))
        partials = pitch * np.array([1, 1.19, 1.56, 2, 2.51, 2.66])
        return envelope * np.sin(2 * np.pi * partials[:, None] * _time(len(envelope))).mean(axis=0)

    return _strokes(rng, samples, (1.5, 3), stroke)


def wind(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Low noise that swells and falls."""
    gusts = 1 + 0.8 * np.sin(2 * np.pi * (rng.uniform(0.6, 1.5) * _time(samples) + rng.uniform()))
    return gusts * _noise(rng, samples, 60, rng.uniform(300, 600))


# answer -> (MMAU task, MMAU category, MMAU sub-category, synthesis)
SOUNDS = {
    "engine": ("sound", "Perception", "Acoustic Source Inference", engine),
    "siren": ("sound", "Perception", "Acoustic Source Inference", siren),
    "rain": ("sound", "Perception", "Ambient Sound Interpretation", rain),
    "clock": ("sound", "Perception", "Acoustic Source Inference", clock),
    "alarm": ("sound", "Perception", "Acoustic Source Inference", alarm),
    "piano": ("music", "Perception", "Instrumentation", piano),
    "organ": ("music", "Perception", "Instrumentation", organ),
    "drums": ("music", "Perception", "Instrumentation", drums),
    "flute": ("music", "Perception", "Instrumentation", flute),
    "man": ("speech", "Perception", "Speaker Identification", man),
    "woman": ("speech", "Perception", "Speaker Identification", woman),
}


# No question of the training has one of these among its choices.
UNNAMED = {
    "bell": ("sound", "Perception", "Acoustic Source Inference", bell),
    "wind": ("sound", "Perception", "Ambient Sound Interpretation", wind),
}


def synthesise(
    name: str,
    rng: np.random.Generator,
    below: tuple[float, float] = (12, 30),
    peak: tuple[float, float] = (0.15, 0.9),
) -> np.ndarray:
    """One clip of a sound of `SOUNDS` or `UNNAMED`, in 16 kHz float64 of shape (samples,).

    Args:
        below: least and most dB of the background noise below the sound.
        peak: least and largest peak.
    """
    samples = int(rng.uniform(*SECONDS) * 20) * SAMPLE_RATE // 20  # steps of 50 ms keep the FFTs' lengths smooth
    signal = (SOUNDS | UNNAMED)[name][-1](rng, samples)
    signal = signal / (np.sqrt(np.mean(signal**2)) + 1e-9)
    signal = signal + 10 ** (-rng.uniform(*below) / 20) * _noise(rng, samples, 50, 7900)
    return rng.uniform(*peak) * signal / np.abs(signal).max()


# --- Files ---


def _write_clip(path: Path, name: str, rng: np.random.Generator) -> None:
    soundfile.write(path, synthesise(name, rng), SAMPLE_RATE, subtype="PCM_16")


def _write_shifted_clip(path: Path, name: str, rng: np.random.Generator) -> None:
    """Noisy, faint or loud, at another rate: all of it what the training's clips are not."""
    peak = (0.01, 0.1) if rng.integers(2) else (0.92, 1.0)
    rate = int(rng.choice(SHIFTED_RATES))
    clip = resample_poly(synthesise(name, rng, below=(0, 10), peak=peak), rate, SAMPLE_RATE)
    soundfile.write(path, np.clip(clip, -1, 1), rate, subtype="PCM_16")


def _questions(
    count: int,
    rng: np.random.Generator,
    names: Sequence[str] = tuple(SOUNDS),
    wordings: Sequence[str] = QUESTIONS,
    choices: tuple[int, int] = (4, 4),
) -> list[tuple[str, str, list[str]]]:
    """`count` x (sound, question, from least to most `choices` that hold it): the sounds in equal shares, in random
    order."""
    answers = [names[index % len(names)] for index in range(count)]
    rng.shuffle(answers)
    questions = []
    for answer in answers:
        size = choices[0] if choices[0] == choices[1] else int(rng.integers(choices[0], choices[1] + 1))
        others = rng.choice([name for name in names if name != answer], size=size - 1, replace=False)
        offered = [answer, *(str(name) for name in others)]
        rng.shuffle(offered)
        questions.append((answer, wordings[int(rng.integers(len(wordings)))], offered))
    return questions


def _write_avqa(folder: Path, file_name: str, first_id: int, count: int, rng: np.random.Generator) -> None:
    """One JSONL file in the training format, and its clips below `folder`/wavs."""
    (folder / "wavs").mkdir(exist_ok=True)
    with open(folder / file_name, "w", encoding="utf-8") as file:
        for number, (answer, question, choices) in enumerate(_questions(count, rng), start=first_id):
            video = f"demo{number:07d}"  # 11 characters, as a YouTube id
            audio_path = f"wavs/{video}_0.wav"
            _write_clip(folder / audio_path, answer, rng)
            row = {
                "id": number,
                "video_name": f"{video}_000000",
                "video_id": number,
                "question_text": question,
                "multi_choice": choices,
                "answer": choices.index(answer),
                "question_relation": "Sound",
                "question_type": "Come From",
                "dataset_name": "AVQA",
                "audio_path": audio_path,
            }
            file.write(json.dumps(row) + "\n")


def _write_mmau(
    folder: Path,
    questions: list[tuple[str, str, list[str]]],
    rng: np.random.Generator,
    file_name: str = MMAU_FILE,
    split: str = "test-mini",
    write_clip: Callable[[Path, str, np.random.Generator], None] = _write_clip,
) -> None:
    """Questions as MMAU's list, and their clips below `folder`/SPLIT-audios."""
    (folder / f"{split}-audios").mkdir()
    items = []
    for answer, question, choices in questions:
        task, category, sub_category, _ = (SOUNDS | UNNAMED)[answer]
        name = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        audio_id = f"./{split}-audios/{name}.wav"
        write_clip(folder / audio_id, answer, rng)
        items.append(
            {
                "id": name,
                "audio_id": audio_id,
                "question": question.replace("video", "audio"),
                "choices": choices,
                "answer": answer,
                "dataset": "demo",
                "task": task,
                "split": split,
                "category": category,
                "sub-category": sub_category,
                "difficulty": "hard" if answer in UNNAMED else "medium" if split == "shifted" else "easy",
            }
        )
    (folder / file_name).write_text(json.dumps(items, indent=2) + "\n", encoding="utf-8")


def make_demo(
    out: str | Path, warm_start: int = 384, train: int = 1024, test: int = 264, shifted: int = 260, seed: int = 1
) -> Path:
    """Write the demo's data set; what was at `out` is replaced once the new one is complete.

    Args:
        out: the folder.
        warm_start, train, test, shifted: the number of questions of each file, one clip each.
        seed: decides all of it.

    Returns:
        `out`.

    Raises:
        ValueError: a count below 1; `out` exists and holds something else than demo data.
    """
    out = Path(out)
    counts = {"warm_start": warm_start, "train": train, "test": test, "shifted": shifted}
    if wrong := [f"--{name} {count}" for name, count in counts.items() if count < 1]:
        raise ValueError(f"{', '.join(wrong)}: every file needs at least 1 question")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MMAU_FILE).is_file())):
        raise ValueError(f"{out}: holds other data than the demo; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        # A stream of its own for each file: resizing one leaves the others as they are.
        streams = [np.random.default_rng([seed, part]) for part in range(4)]
        _write_avqa(folder, WARM_START_FILE, 1, warm_start, streams[0])
        _write_avqa(folder, TRAIN_FILE, 1 + warm_start, train, streams[1])
        _write_mmau(folder, _questions(test, streams[2]), streams[2])
        asked = _questions(shifted, streams[3], (*SOUNDS, *UNNAMED), SHIFTED_QUESTIONS, (2, 8))
        _write_mmau(folder, asked, streams[3], SHIFTED_FILE, "shifted", _write_shifted_clip)
        if out.exists():
            shutil.move(out, Path(temporary) / "old")
        folder.rename(out)
    return out


def main() -> None:
    parser = ArgumentParser(description="Synthesise the demo's clips and question files.", allow_abbrev=False)
    parser.add_argument("--out", default="data/demo", help="folder to write (replaced if it holds demo data)")
    parser.add_argument("--seed", type=at_least(0), default=1, help="decides every clip and question")
    parser.add_argument("--warm_start", type=at_least(1), default=384, help="questions for the supervised warm start")
    parser.add_argument("--train", type=at_least(1), default=1024, help="questions for GRPO")
    parser.add_argument("--test", type=at_least(1), default=264, help="held-out questions")
    parser.add_argument("--shifted", type=at_least(1), default=260, help="questions away from the training's")
    args = parser.parse_args()
    clips = args.warm_start + args.train + args.test + args.shifted
    print(f"{args.out}: synthesising {clips} clips ...", flush=True)
    try:
        make_demo(**vars(args))
    except (ValueError, OSError) as error:
        sys.exit(f"make_demo: {error}")
    print(
        f"{args.out}: {args.warm_start} questions for the warm start, {args.train} for GRPO, {args.test} held out, "
        f"{args.shifted} away from both; "
        f"{len(SOUNDS)} sounds: {', '.join(SOUNDS)}"
    )


if __name__ == "__main__":
    main()
