"""Evaluate checkpoints on MMAU or MMAR, in one process or in one per GPU under torchrun (`sh test_mmau.sh`).

    python src/test_mmau.py --model_path exp/model/checkpoint-* --data_file data/MMAU/mmau-test-mini.json

A killed run continues, a finished checkpoint is skipped. `evaluation/results.py` lists the files that it writes, and
`utils/show_acc.py` prints a table of them.
"""

import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C exits at once, even during imports: finished answers are on disk
    NOTICE = b"\ntest_mmau: interrupted; the same command continues from here\n" * (os.environ.get("RANK", "0") == "0")
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, NOTICE), os._exit(130)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads do not spin

import torch

from dataset.audio import CHANNELS
from dataset.prompt import DEFAULT_STYLE, STYLES
from dataset.questions import load_questions
from evaluation.clips import AUDIO
from evaluation.processes import leave, processes, say
from evaluation.results import MAX_NEW_TOKENS, Settings
from evaluation.sweep import DTYPES, Sweep, make_jobs, run_sweep
from utils.flags import at_least


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description="Evaluate checkpoints of Qwen2-Audio on MMAU or MMAR.", allow_abbrev=False)
    add = parser.add_argument
    add("--model_path", nargs="+", required=True, metavar="[LABEL=]MODEL", help="folders or hub names; results are "
        "named by LABEL, else by the step of checkpoint-300 or the folder's name")  # fmt: skip
    add("--data_file", nargs="+", default=["data/MMAU/mmau-test-mini.json"], help="MMAU's JSON or MMAR's JSONL")
    add("--audio_dir", help="folder that the clips' paths are relative to; default: the folder of --data_file")
    add("--out_dir", help="results go to OUT_DIR/test_LABEL/; default: the folder that holds the checkpoint")
    add("--out_file", help="the results of a single model on a single file instead")
    add("--batch_size", type=at_least(1), default=32, help="questions at once")
    add("--prompt_style", choices=STYLES, help="default: the style recorded in the checkpoint, else "
        f"{DEFAULT_STYLE} (the paper's Prompt <2>); choice is <1>, think <3>")  # fmt: skip
    add("--hear", choices=AUDIO, default="real", help="silent or shuffled instead of the clip: is the model listening?")
    add("--audio_channels", choices=CHANNELS, default="first", help="channel(s) of a clip to use; paper: first")
    add("--sample", action="store_true", help="draw answers as the original did, instead of the most probable tokens")
    add("--seed", type=at_least(0), default=42, help="of --sample")
    add("--max_new_tokens", type=at_least(1), default=MAX_NEW_TOKENS, help="longest completion")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 without")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--allow_missing", action="store_true", help="count questions without a usable clip as wrong, do not stop")
    add("--allow_outside", action="store_true", help="use clips outside --audio_dir as well")
    add("--force", action="store_true", help="evaluate again what is finished")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or DTYPES[args.device]
    return args


def run(args: Namespace) -> int:
    """Evaluate all models on all question files, and return the exit status: 3 if some were skipped, 1 if all. Raises a
    `ValueError` or `OSError` if questions cannot be read or asked, or two results would have the same name."""
    if args.out_file and len(args.data_file) > 1:
        raise ValueError("--out_file holds the results on one file of questions; pass a single --data_file")
    jobs = make_jobs(args.model_path, args.out_dir, args.out_file)
    benchmarks = {path: load_questions(path, args.audio_dir, (), args.allow_outside) for path in args.data_file}
    if len({benchmark.name for benchmark in benchmarks.values()}) < len(args.data_file):
        raise ValueError(f"--data_file {' '.join(args.data_file)}: results would have one name; pass one at a time")
    settings = Settings(dtype=args.dtype, style=args.prompt_style, audio=args.hear, channels=args.audio_channels,
                   max_new_tokens=args.max_new_tokens, sample_seed=args.seed if args.sample else None,
                   allow_missing=args.allow_missing, batch_size=args.batch_size)  # fmt: skip
    evaluated, total = 0, len(jobs) * len(benchmarks)
    for file, benchmark in benchmarks.items():
        suffix = ".jsonl" if Path(file).suffix == ".jsonl" else ".json"  # that of the benchmark's own script
        sweep = Sweep(benchmark, settings, suffix, args.device, args.force)
        evaluated += run_sweep(sweep, jobs)
    if evaluated < total:
        say(f"{total - evaluated} of {total} evaluations were skipped")
    return 0 if evaluated == total else 3 if evaluated else 1


def main() -> int:
    args, status = parse_args(), 1
    processes()
    try:
        status = run(args)
    except (ValueError, OSError) as error:
        say(f"test_mmau: {error}")
    leave()
    return status


if __name__ == "__main__":
    sys.exit(main())
