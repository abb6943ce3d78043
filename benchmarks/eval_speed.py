"""Questions per second of evaluation against the plain loop, on one model, one machine, in one run.

    python benchmarks/eval_speed.py                                  a small model, made here, on synthetic clips
    python benchmarks/eval_speed.py --model_path M --data_file mmau-test-mini.json --questions 256 --max_new_tokens 256
    python benchmarks/eval_speed.py --size 7b                       Qwen2-Audio-7B's shape with random weights, on a GPU

One line for each limit on new tokens. The small model's answers all reach it; the last limit is measured again with the
end tokens' logits doubled: answers then end after different numbers of tokens, about 100 on average.

Plain loop: file order, one process, clips decoded in line, batches of 32 padded to the longest, the processor and
`model.generate` as their documentation uses them; greedy, with the same limit on new tokens. Loading the model is not
counted. The two take turns. Prints how many of the answers are equal: in float32 all but near ties.
"""

# ruff: noqa: E402
import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "demo")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as test_mmau.py has it, for both loops
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import soundfile
import torch
from transformers import AutoProcessor

from dataset.audio import SAMPLE_RATE, load_audio
from dataset.encode import build_chat
from dataset.prompt import build_question
from dataset.questions import Benchmark, load_questions
from evaluation import results
from evaluation.answers import EncodedQuestions, answer_batches
from evaluation.checkpoints import load_model
from evaluation.clips import measure_clips
from model.qwen2_audio import end_ids
from step_time import describe_machine
from steps import SIZES, Settings, build, write_record
from tiny import build_demo_model, build_processor

CHOICES = ["a dog", "a church bell", "a passing car", "rain on a roof"]


def make_questions(folder: Path, count: int) -> Path:
    """An MMAU-like file: 44.1 kHz stereo clips, most of them 10 s long, some shorter, a few up to 30 s."""
    rng = np.random.default_rng(0)
    rows = []
    (folder / "clips").mkdir()
    for number in range(count):
        seconds = rng.choice([10, rng.uniform(2, 10), rng.uniform(10, 30)], p=[0.6, 0.3, 0.1])
        noise = rng.normal(scale=0.05, size=(round(44_100 * seconds), 2))
        soundfile.write(folder / "clips" / f"{number}.wav", noise, 44_100)
        question = (
            "Which of these sounds is heard " + rng.choice(["first", "last", "most of the time, all in all"]) + "?"
        )
        rows.append({"id": str(number), "audio_id": f"clips/{number}.wav", "question": question, "choices": CHOICES})
        rows[-1] |= {"answer": CHOICES[number % 4], "task": "sound", "difficulty": "easy", "split": "test-mini"}
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder / "questions.json"


def run_plain(model, processor, benchmark: Benchmark, style: str, max_new_tokens: int, batch_size: int = 32) -> dict:
    """The plain loop: {id: completion}."""
    completions = {}
    for start in range(0, len(benchmark.questions), batch_size):
        questions = benchmark.questions[start : start + batch_size]
        clips = [load_audio(question.audio_path) for question in questions]
        records = [question.record for question in questions]
        chats = [build_chat(processor, build_question(row["question"], row["choices"], style)) for row in records]
        inputs = processor(text=chats, audio=clips, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            suppress_tokens=[model.config.audio_token_id],
            eos_token_id=end_ids(processor),
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        completions |= {question.id: text for question, text in zip(questions, texts, strict=True)}
    return completions


def run_ours(model, processor, benchmark: Benchmark, style: str, max_new_tokens: int, batch_size: int) -> dict:
    """The work of `test_mmau.py` between loading the model and writing the results, with the check of all clips."""
    run = results.Settings(style=style, max_new_tokens=max_new_tokens, batch_size=batch_size)
    samples = measure_clips(benchmark.questions, run.channels)
    questions = EncodedQuestions(benchmark.questions, samples, processor, run)
    completions = {}
    answer_batches(model, questions, questions.batches(), completions.update, title=None)
    return {id_: completion.text for id_, completion in completions.items()}


def measure(loops: dict[str, Callable[[], dict]], repeats: int) -> dict:
    """Let the loops take turns; their seconds (the best of `repeats`), and how many of their answers are equal."""
    seconds, answers = {}, {}
    for _ in range(repeats):
        for name, loop in loops.items():
            start = time.perf_counter()
            answers[name] = loop()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    expected, given = answers.values()
    equal = sum(given[name] == text for name, text in expected.items())
    return {"seconds": seconds, "questions": len(given), "equal": equal}


def to_line(found: dict) -> str:
    """The result of `measure` as text."""
    number = found["questions"]
    each = [f"{name} {took:.1f} s, {number / took:.2f} questions/s" for name, took in found["seconds"].items()]
    plain, ours = found["seconds"].values()
    return f"{'; '.join(each)}; {plain / ours:.2f} times as fast; {found['equal']} of {number} answers equal"


def load(args: argparse.Namespace, folder: Path, benchmark: Benchmark, dtype: torch.dtype, device: torch.device):
    """The model to ask, and its processor."""
    if not args.model_path:
        # A vocabulary learned from the questions, so that prompts are as long in tokens as the real ones.
        texts = [build_question(question.record["question"], CHOICES) for question in benchmark.questions]
        processor = build_processor(texts, seconds=30, mel_bins=128)
        if args.size:
            processor.tokenizer.padding_side = "left"
            return build(Settings(size=args.size, dtype=dtype, device=device), processor).eval(), processor
        build_demo_model(folder / "model", processor)
    processor = AutoProcessor.from_pretrained(args.model_path or folder / "model")
    processor.tokenizer.padding_side = "left"
    return load_model(args.model_path or folder / "model", dtype, device), processor


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions per second, against the plain loop.")
    parser.add_argument("--model_path", help="default: a small model with random weights")
    parser.add_argument("--size", choices=list(SIZES), help="of a model with random weights instead, made in place")
    parser.add_argument("--json", type=Path, help="also write the record to this file")
    parser.add_argument("--data_file", help="MMAU's questions, clips beside them; default: synthetic ones")
    parser.add_argument("--questions", type=int, default=96, help="how many, from the file's start")
    parser.add_argument("--batch_size", type=int, default=32, help="ours; the plain loop's is 32")
    parser.add_argument(
        "--max_new_tokens", type=int, nargs="+", default=[12, 64, 256], help="a trained model's answers take about 12"
    )
    parser.add_argument("--repeats", type=int, default=1, help="the fastest of so many counts")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, torch.device("cuda")) if on_gpu else (torch.float32, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        benchmark = load_questions(args.data_file or make_questions(folder, args.questions))
        benchmark = Benchmark(**(vars(benchmark) | {"questions": benchmark.questions[: args.questions]}))
        model, processor = load(args, folder, benchmark, dtype, device)
        cases = [(limit, "") for limit in args.max_new_tokens]
        if not args.model_path:
            cases.append((args.max_new_tokens[-1], ", answers of any length"))
        record = {"size": args.size, "machine": describe_machine(device), "dtype": str(dtype), "cases": []}
        for limit, ending in cases:
            if ending:
                model.lm_head.weight.data[end_ids(processor)] *= 2
            asked = (model, processor, benchmark, "answer", limit)
            loops = {
                "plain loop": lambda asked=asked: run_plain(*asked),
                "ours": lambda asked=asked: run_ours(*asked, args.batch_size),
            }
            found = measure(loops, args.repeats)
            print(f"{limit} tokens{ending}: {to_line(found)}", flush=True)
            record["cases"].append({"case": f"{limit} tokens{ending}"} | found)
    if args.json:
        write_record(args.json, record)


if __name__ == "__main__":
    main()
