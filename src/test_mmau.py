"""Evaluate checkpoints on MMAU or MMAR: `sh test_mmau.sh` starts it; `--help` lists every flag.

    python src/test_mmau.py --model_path exp/model/checkpoint-* --data_file data/MMAU/mmau-test-mini.json

For each checkpoint, in one process (or one per GPU, under torchrun), and for MMAU's test-mini:

    exp/model/test_300/res_mmau_mini.json     the questions with `model_prediction` (and `model_output`, the same)
    exp/model/test_300/eval_mmau_mini.txt     the official scores; none where the answers are blank
    exp/model/test_300/run_mmau_mini.json     what was evaluated, and how

Answers are written as they come, to `res_mmau_mini.json.partial-*`; a run that was killed continues from there. A
finished checkpoint is skipped. Leaves out the table: `utils/show_acc.py` prints it from these files.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

# Before these libraries are loaded. Worker processes are forked later, which tokenizers' threads would not survive; and
# torch's threads shall not spin while they wait for one that lost its core to another process.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from transformers import AutoProcessor
from transformers.utils import logging

from dataset.audio import CHANNELS
from dataset.prompt import DEFAULT_STYLE, STYLES, extract_answer, load_style
from dataset.questions import Benchmark, load_benchmark
from evaluation.answers import (
    AUDIO,
    EncodedQuestions,
    Settings,
    answer_batches,
    check_clips,
    default_workers,
    find_problems,
    make_batches,
)
from evaluation.mmau import evaluate
from model.checkpoints import IncompleteCheckpoint, check_whole, fingerprint, label_of, load_model, locate
from model.generation import MAX_NEW_TOKENS

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SHOWN = 20  # problems listed in one message


@dataclass(frozen=True)
class Job:
    """One model to evaluate, and where its results go."""

    model: str  # folder or hub name
    label: str  # in the table
    results: Path  # res_*.json

    @property
    def run_file(self) -> Path:
        return self._beside("run", ".json")

    @property
    def eval_file(self) -> Path:
        return self._beside("eval", ".txt")

    def partial(self, rank: int | str) -> Path:
        """Where a process leaves its answers until all are there."""
        return self.results.with_name(f"{self.results.name}.partial-{rank}")

    def partials(self) -> list[Path]:
        return [path for path in sorted(self.results.parent.iterdir()) if path.name.startswith(self.partial("").name)]

    def _beside(self, kind: str, suffix: str) -> Path:
        return self.results.with_name(f"{kind}_{self.results.stem.removeprefix('res_')}{suffix}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate checkpoints of Qwen2-Audio on MMAU or MMAR.")
    add = parser.add_argument
    add("--model_path", nargs="+", required=True, metavar="[LABEL=]MODEL", help="folders or hub names; results are "
        "named by LABEL, else by the step of checkpoint-300 or the folder's name")  # fmt: skip
    add("--data_file", default="data/MMAU/mmau-test-mini.json", help="questions: MMAU's JSON or MMAR's JSONL")
    add("--audio_dir", help="what the clips' paths start from; default: the folder of --data_file")
    add("--out_dir", help="results go to OUT_DIR/test_LABEL/; default: the folder that holds the checkpoint")
    add("--out_file", help="results of a single model go to this file instead")
    add("--batch_size", type=int, default=32, help="questions at once")
    add("--prompt_style", choices=STYLES, help="default: the style recorded in the checkpoint, else "
        f"{DEFAULT_STYLE} (the paper's Prompt <2>); choice is <1>, think <3>")  # fmt: skip
    add("--audio", choices=AUDIO, default="real", help="silent or shuffled: is the model listening?")
    add("--audio_channels", choices=CHANNELS, default="first", help="channel(s) of a clip to hear; paper: first")
    add("--sample", action="store_true", help="draw answers as the original did, instead of the most probable tokens")
    add("--seed", type=int, default=42, help="of --sample")
    add("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest completion")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 without")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--workers", type=int, help="processes that decode clips ahead, per process; default: by the number of cores")
    add(
        "--allow_missing",
        action="store_true",
        help="count questions without a usable clip as wrong instead of stopping",
    )
    add("--force", action="store_true", help="evaluate again what is finished")
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.workers is None:
        args.workers = default_workers(args.device)
    return args


def make_jobs(args: argparse.Namespace, benchmark: Benchmark) -> list[Job]:
    """One job for each `--model_path`, checkpoints in the order of their steps.

    Raises:
        ValueError: two of them would write the same file, or `--out_file` is given for several.
    """
    name = benchmark.name + ("" if args.audio == "real" else f"_{args.audio}") + ("_sample" if args.sample else "")
    # Predictions go into the format that the questions came in, which the benchmark's own script reads.
    suffix = ".jsonl" if Path(args.data_file).suffix == ".jsonl" else ".json"
    jobs = []
    for given in args.model_path:
        label, model = None, given
        if "=" in given and not Path(given).exists():
            label, _, model = given.partition("=")
            if "/" in label:
                raise ValueError(f"{given}: no such folder, and {label!r} cannot be a label")
        label = label or label_of(model)
        if args.out_dir:
            out_dir = Path(args.out_dir)
        else:
            out_dir = Path(model).parent if Path(model).exists() else Path("exp") / label
        jobs.append(Job(model, label, Path(args.out_file or out_dir / f"test_{label}" / f"res_{name}{suffix}")))
    if len({job.results for job in jobs}) < len(jobs):
        raise ValueError(
            "two models would write to the same file; give them labels (--model_path base=PATH ...) and --out_dir"
        )
    return sorted(jobs, key=lambda job: int(job.label) if job.label.isdecimal() else -1)


# Checkpoints


def choose_style(args: argparse.Namespace, folder: Path) -> str:
    """The prompt style that the checkpoint was trained with, or `--prompt_style`."""
    recorded = load_style(folder)
    if args.prompt_style and recorded and args.prompt_style != recorded:
        say(
            f"warning: {folder} was trained with prompt style {recorded!r}; "
            f"--prompt_style {args.prompt_style} overrides it"
        )
    return args.prompt_style or recorded or DEFAULT_STYLE


def describe_run(args: argparse.Namespace, benchmark: Benchmark, job: Job) -> dict:
    """What decides the answers: two runs with equal descriptions end in the same file.

    Raises:
        ValueError: the checkpoint is not there, or not whole, or its style record is damaged.
    """
    folder = locate(job.model)
    check_whole(folder)
    settings = Settings(
        style=choose_style(args, folder),
        audio=args.audio,
        channels=args.audio_channels,
        max_new_tokens=args.max_new_tokens,
        sample_seed=args.seed if args.sample else None,
    )
    run = {
        "label": job.label,
        "weights": fingerprint(folder),
        "benchmark": benchmark.name,
        "release": benchmark.release,
        "questions": benchmark.digest,
        "dtype": args.dtype,
    } | asdict(settings)
    if args.dtype != "float32":  # there the batch's shape changes rounding
        run["batch_size"] = args.batch_size
    return run


def is_finished(job: Job, run: dict) -> bool:
    """Whether the results of exactly this run are there."""
    if not job.results.is_file():
        return False
    try:
        found = json.loads(job.run_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    different = sorted(key for key in run if key not in ("label", "batch_size") and found.get(key) != run[key])
    if different:
        say(f"{job.results}: is of another run ({', '.join(different)} differ): evaluated again")
    return not different


def evaluate_model(args, benchmark: Benchmark, samples: dict, decoded: dict, job: Job, run: dict) -> None:
    """Ask one model all questions and write its results.

    Args:
        samples, decoded: what `check_clips` found.

    Raises:
        ValueError: questions cannot be asked, and `--allow_missing` was not given.
    """
    folder = locate(job.model)
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    settings = Settings(**{key: run[key] for key in Settings.__dataclass_fields__})
    questions = EncodedQuestions(benchmark.questions, processor, settings, decoded)
    missing = find_problems(questions, samples)
    if missing:
        listed = [f"{id_}: {problem}" for id_, problem in missing.items()]
        if not args.allow_missing:
            listed[SHOWN:] = [f"... and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
            raise ValueError(
                f"{len(missing)} of {len(benchmark.questions)} questions cannot be asked "
                "(--allow_missing counts them as wrong):\n  " + "\n  ".join(listed)
            )
        say(f"{len(missing)} questions cannot be asked and count as wrong:\n  " + "\n  ".join(listed))
        usable = [question for question in benchmark.questions if question.id not in missing]
        questions = EncodedQuestions(usable, processor, settings, decoded)
    cut = sum(samples[question.audio_path] > questions.window for question in questions.questions)
    if cut:
        window = processor.feature_extractor.chunk_length
        say(f"{cut} clips are longer than the model's {window} s: cut, as the paper did")

    done = from_rank_0(lambda: resume(job, run))
    batches = make_batches(questions, samples, args.batch_size)
    # A batch is done as a whole or again, so that batches keep their shape.
    names = [question.id for question in questions.questions]
    open_batches = [batch for batch in batches if not all(names[index] in done for index in batch)]
    if done:
        say(f"{job.label}: {len(done)} answers are there already")
    if share := open_batches[RANK::WORLD]:
        device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else None)
        model = load_model(folder, getattr(torch, args.dtype), device)
        with open_partial(job, run) as write:
            answer_batches(model, questions, share, args.workers, write, job.label, quiet=RANK > 0)
    barrier()
    if RANK == 0:
        finish(job, run, benchmark, read_partials(job, run), {"missing": sorted(missing), "cut": cut})
    barrier()


# Results on disk


def resume(job: Job, run: dict) -> dict[str, str]:
    """{id: completion} of a run that did not end, now in one partial file; what is of other runs is dropped."""
    job.results.parent.mkdir(parents=True, exist_ok=True)
    done = read_partials(job, run)
    write_whole(job.partial(0), to_lines([run, *map(list, done.items())]))
    for path in job.partials():
        if path != job.partial(0):
            path.unlink()
    return done


def read_partials(job: Job, run: dict) -> dict[str, str]:
    """{id: completion} of all partial files of this very run."""
    done = {}
    for path in job.partials():
        *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # the last was cut off, or is empty
        if lines and lines[0] == json.dumps(run):
            done |= dict(json.loads(line) for line in lines[1:])
        elif lines:
            say(f"{path}: is of another run, dropped")
    return done


@contextmanager
def open_partial(job: Job, run: dict) -> Iterator:
    """A function that appends a batch's {id: completion} to this process's partial file, at once and as a whole."""
    path = job.partial(RANK)
    if not path.exists():
        write_whole(path, to_lines([run]))
    with open(path, "a", encoding="utf-8") as file:

        def write(completions: dict[str, str]) -> None:
            file.write(to_lines(map(list, completions.items())))
            file.flush()
            os.fsync(file.fileno())

        yield write


def finish(job: Job, run: dict, benchmark: Benchmark, completions: dict[str, str], clips: dict) -> None:
    """Write the results of a whole run, the predictions last: where they are, all is there.

    Args:
        clips: `missing`, ids of the questions that could not be asked, and `cut`, how many clips were too long.
    """
    records = []
    for question in benchmark.questions:
        completion = "" if question.id in clips["missing"] else completions[question.id]
        answer = extract_answer(completion)
        record = question.record | {"model_prediction": answer, "model_output": answer}
        record |= {"answer_prediction": answer} if benchmark.name == "mmar" else {"release": benchmark.release}
        records.append(record | {"model_completion": completion})
    job.results.unlink(missing_ok=True)  # of another run
    if benchmark.has_answers:
        scores = evaluate(records)
        write_whole(job.eval_file, str(scores))
        say(f"{job.label}: {scores.accuracy:.2f}% of {scores.questions} questions, {job.results}")
    else:
        job.eval_file.unlink(missing_ok=True)
        say(f"{job.label}: the answers are blank, so there is no score; {job.results} is the file to submit")
    write_whole(job.run_file, json.dumps(run | clips, indent=2) + "\n")
    lines = job.results.suffix == ".jsonl"
    write_whole(job.results, to_lines(records) if lines else json.dumps(records, indent=2) + "\n")
    for path in job.partials():
        path.unlink()


def to_lines(rows: Iterable) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# Processes


@contextmanager
def process_group() -> Iterator[None]:
    if WORLD == 1:
        yield
        return
    # Processes only exchange small objects; one that waits for another's last batch must not give up on it.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    yield
    dist.destroy_process_group()


def barrier() -> None:
    if WORLD > 1:
        dist.barrier()


def from_rank_0(compute):
    """`compute()` of the first process, in all of them; a `ValueError` of it likewise."""
    value = None
    if RANK == 0:
        try:
            value = compute()
        except ValueError as error:
            value = error
    if WORLD > 1:
        values = [value]
        dist.broadcast_object_list(values)
        value = values[0]
    if isinstance(value, ValueError):
        raise value
    return value


def check_all_clips(args: argparse.Namespace, benchmark: Benchmark) -> tuple[dict, dict]:
    """`check_clips` on all clips of a benchmark, each process on its share; all of them know all lengths then."""
    paths = sorted({question.audio_path for question in benchmark.questions})
    samples, decoded = check_clips(paths[RANK::WORLD], args.workers, args.audio_channels)
    if WORLD > 1:
        shares = [{} for _ in range(WORLD)]
        dist.all_gather_object(shares, samples)
        samples = {path: length for share in shares for path, length in share.items()}
    return samples, decoded


def say(text: str) -> None:
    if RANK == 0:
        print(text, file=sys.stderr, flush=True)


def run_sweep(args: argparse.Namespace) -> int:
    """Evaluate all models; the number of those that have results in the end."""
    benchmark = load_benchmark(args.data_file, args.audio_dir)
    jobs = make_jobs(args, benchmark)
    say(benchmark.title)
    clips, evaluated = None, 0
    for job in jobs:
        try:
            run = from_rank_0(lambda job=job: describe_run(args, benchmark, job))
        except ValueError as error:
            say(f"{job.label}: skipped. {error}")
            continue
        if not args.force and from_rank_0(lambda job=job, run=run: is_finished(job, run)):
            say(f"{job.label}: finished before, skipped (--force repeats it)")
        else:
            clips = clips or check_all_clips(args, benchmark)
            try:
                evaluate_model(args, benchmark, *clips, job, run)
            except IncompleteCheckpoint as error:
                say(f"{job.label}: skipped. {error}")
                continue
        evaluated += 1
    return evaluated


def main() -> int:
    args = parse_args()
    logging.disable_progress_bar()
    try:
        with process_group():
            return 0 if run_sweep(args) else 1
    except (ValueError, FileNotFoundError) as error:
        say(f"test_mmau: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
