"""Evaluate checkpoints on MMAU or MMAR: `sh test_mmau.sh` starts it; `--help` lists every flag.

    python src/test_mmau.py --model_path exp/model/checkpoint-* --data_file data/MMAU/mmau-test-mini.json

In one process, or one per GPU under torchrun. `evaluation/results.py` shows what is written; a run that was killed
continues, a finished checkpoint is skipped. Leaves out the table: `utils/show_acc.py` prints it from these files.
"""

import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

# Ctrl-C ends it at once, the imports' seconds included: what is answered is on disk. The first process says so; those
# that it forks, and the others of the run, end without a word.
if __name__ == "__main__":
    SPEAKER, SAID = os.getpid(), b"\ntest_mmau: interrupted; the same command goes on from here\n"
    if os.environ.get("RANK", "0") == "0":
        signal.signal(signal.SIGINT, lambda *_: (os.getpid() == SPEAKER and os.write(2, SAID), os._exit(130)))
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
# Before these libraries are loaded. Worker processes are forked later, which tokenizers' threads would not survive; and
# torch's threads shall not spin while they wait for one that lost its core to another process.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from command_line import ArgumentParser, at_least
from dataset.audio import CHANNELS
from dataset.prompt import DEFAULT_STYLE, STYLES
from dataset.questions import load_questions
from evaluation.answers import AUDIO, default_workers
from evaluation.results import MAX_NEW_TOKENS, Run
from evaluation.sweep import DTYPES, Sweep, leave, make_jobs, processes, run_sweep, say
from launch.packages import find_missing_packages
from model.vllm_engine import GreedyEngine
from quiet import silence_libraries


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description="Evaluate checkpoints of Qwen2-Audio on MMAU or MMAR.")
    add = parser.add_argument
    add("--model_path", nargs="+", required=True, metavar="[LABEL=]MODEL", help="folders or hub names; results are "
        "named by LABEL, else by the step of checkpoint-300 or the folder's name")  # fmt: skip
    add("--data_file", nargs="+", default=["data/MMAU/mmau-test-mini.json"],
        help="questions: MMAU's JSON or MMAR's JSONL, one file or several")  # fmt: skip
    add("--audio_dir", help="what the clips' paths start from; default: the folder of --data_file")
    add("--out_dir", help="results go to OUT_DIR/test_LABEL/; default: the folder that holds the checkpoint")
    add("--out_file", help="results of a single model on a single file go here instead")
    add("--batch_size", type=at_least(1), default=32, help="questions at once")
    add("--prompt_style", choices=STYLES, help="default: the style recorded in the checkpoint, else "
        f"{DEFAULT_STYLE} (the paper's Prompt <2>); choice is <1>, think <3>")  # fmt: skip
    add("--hear", choices=AUDIO, default="real", help="silent or shuffled instead of the clip: is the model listening?")
    add("--audio_channels", choices=CHANNELS, default="first", help="channel(s) of a clip to hear; paper: first")
    add("--sample", action="store_true", help="draw answers as the original did, instead of the most probable tokens")
    add("--seed", type=at_least(0), default=42, help="of --sample")
    add("--max_new_tokens", type=at_least(1), default=MAX_NEW_TOKENS, help="longest completion")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 without")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--workers", type=at_least(0), help="processes that decode clips ahead, each; default: by the number of cores; "
        "with 0 a single one does everything")  # fmt: skip
    add("--engine", choices=("built-in", "vllm"), default="built-in", help="vllm: for long answers; not byte-exact")
    add("--allow_missing", action="store_true", help="count questions without a usable clip as wrong, do not stop")
    add("--force", action="store_true", help="evaluate again what is finished")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or DTYPES[args.device]
    if args.workers is None:
        args.workers = default_workers(args.device)
    args.vllm = GreedyEngine() if args.engine == "vllm" else None
    return args


def run(args: Namespace) -> int:
    """The sweeps that the command line asks for, one for each question file; the exit status: 3 if some models were
    skipped, 1 if all. Raises likewise."""
    if problems := find_missing_packages({"engine": args.engine}):
        raise ValueError(problems[0])
    if args.vllm and args.sample:
        raise ValueError("--sample with --engine vllm: seeds stand for draws of the built-in engine; leave one away")
    if args.out_file and len(args.data_file) > 1:
        raise ValueError("--out_file holds the results on one file of questions; name a single --data_file")
    jobs = make_jobs(args.model_path, args.out_dir, args.out_file)
    benchmarks = [load_questions(file, args.audio_dir) for file in args.data_file]
    named = {benchmark.name: file for benchmark, file in zip(benchmarks, args.data_file, strict=True)}
    if len(named) < len(benchmarks):
        raise ValueError(f"results of {' and '.join(args.data_file)} would have one name; evaluate them one by one")
    asked = Run(
        dtype=args.dtype,
        style=args.prompt_style,
        audio=args.hear,
        channels=args.audio_channels,
        max_new_tokens=args.max_new_tokens,
        sample_seed=args.seed if args.sample else None,
        allow_missing=args.allow_missing,
        batch_size=args.batch_size,
        engine=args.engine,
    )
    evaluated = 0
    for benchmark in benchmarks:
        # Predictions go into the format that the questions came in, which the benchmark's own script reads.
        suffix = ".jsonl" if Path(named[benchmark.name]).suffix == ".jsonl" else ".json"
        evaluated += run_sweep(Sweep(benchmark, asked, suffix, args.device, args.workers, args.force, args.vllm), jobs)
    if skipped := len(jobs) * len(benchmarks) - evaluated:
        what = "models" if len(benchmarks) == 1 else "evaluations"
        say(f"{skipped} of {len(jobs) * len(benchmarks)} {what} were skipped")
        return 3 if evaluated else 1
    return 0


def main() -> int:
    args = parse_args()
    silence_libraries()
    processes()
    try:
        status = run(args)
    except (ValueError, OSError) as error:
        say(f"test_mmau: {error}")
        status = 1
    leave(args.vllm and args.vllm.close)
    return status


if __name__ == "__main__":
    sys.exit(main())
