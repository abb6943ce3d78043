"""Several models on one benchmark, in one process or several: which model is evaluated, in which order, by whom.

All processes evaluate the same models and answer their shares; the first one reads and writes the files that decide.
See also `results.py` (the files) and `answers.py` (the answers).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from dataset.audio import SAMPLE_RATE
from dataset.prompt import DEFAULT_STYLE, load_style
from dataset.questions import Benchmark
from dataset.rows import DataError, first_problems
from model.qwen2_audio import load_processor

from .answers import Complete, EncodedQuestions, answer_batches, complete_with
from .checkpoints import check_whole, fingerprint, label_of, load_model, locate
from .clips import hash_clips, measure_clips
from .mmau import evaluate
from .processes import processes, run_on_all, say
from .results import Completion, ResultFiles, Run, digest, to_records

DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # default of the weights on each device


@dataclass(frozen=True)
class Job:
    """One model to evaluate, and where its results go."""

    model: str  # folder or hub name
    label: str  # in the table
    folder: Path  # for the results
    file: Path | None = None  # of the results, if its name is given


@dataclass(frozen=True)
class Sweep:
    """What is the same for all models."""

    benchmark: Benchmark
    run: Run  # with style None each checkpoint's own is used
    suffix: str = ".json"  # of the result files
    device: str = "cpu"  # or cuda
    force: bool = False  # evaluate again what is finished
    # What answers: (model, questions) -> function that completes a batch. Other engines get the model on the CPU.
    engine: Callable[[PreTrainedModel, EncodedQuestions], Complete] = complete_with


def make_jobs(models: list[str], out_dir: str | None = None, out_file: str | None = None) -> list[Job]:
    """One job for each model, checkpoints in the order of their steps.

    Args:
        models: folders or hub names, each as MODEL or LABEL=MODEL.
        out_dir: holds test_LABEL, the folder of the results; by default the folder that holds the checkpoint.
        out_file: the results of a single model instead.

    Raises:
        ValueError: two of them would write the same files.
    """
    jobs = []
    for given in dict.fromkeys(models):
        label, model = None, given
        if "=" in given and not Path(given).exists():
            label, _, model = given.partition("=")
            if "/" in label:
                raise ValueError(f"{given}: no such folder, and {label!r} cannot be a label")
        label = label or label_of(model)
        folder = Path(out_dir) if out_dir else Path(model).parent if Path(model).exists() else Path("exp") / label
        jobs.append(Job(model, label, folder / f"test_{label}", Path(out_file) if out_file else None))
    if len({job.file or job.folder for job in jobs}) < len(jobs):
        raise ValueError(
            "two models would write to the same file; give them labels (--model_path base=PATH ...) and --out_dir"
        )
    return sorted(jobs, key=lambda job: int(job.label) if job.label.isdecimal() else -1)


def run_sweep(sweep: Sweep, jobs: list[Job]) -> int:
    """Evaluate all models that are not finished. A model that cannot be evaluated is reported and skipped.

    Returns:
        The number of models that have results now.

    Raises:
        ValueError: the rows cannot be scored.
        DataError: questions cannot be asked, and the run does not allow it.
    """
    benchmark, evaluated = sweep.benchmark, 0
    say(benchmark.title)
    if benchmark.faults:
        count = f"warning: {len(benchmark.faults)} of {len(benchmark.questions)} rows are not as they should be"
        say(f"{count}; they are asked and counted nevertheless:\n  {first_problems(benchmark.faults)}")
    if benchmark.has_answers:  # fails now instead of after hours
        evaluate(to_records(benchmark, {question.id: Completion("", False) for question in benchmark.questions}))
    hashes = run_on_all(lambda: hash_clips(benchmark.questions))
    measure = cache(lambda: measure_clips(benchmark.questions, sweep.run.channels))  # once, unless all is finished
    run = replace(
        sweep.run,
        benchmark=benchmark.name,
        release=benchmark.release,
        questions=benchmark.digest,
        records=digest(json.dumps([question.record for question in benchmark.questions]).encode()),
        clips=digest(" ".join(hashes[question.audio_path] for question in benchmark.questions).encode()),
    )
    sweep = replace(sweep, run=run)
    for job in jobs:
        try:
            folder, run, files = run_on_all(partial(_describe, sweep, job), main=True)
            _evaluate_model(sweep, hashes, measure, folder, run, files)
            evaluated += 1
        except DataError:
            raise
        except (ValueError, OSError) as error:
            unnamed = isinstance(error, OSError) and not error.filename  # a full disk, say
            say(f"{job.label}: skipped. {f'{job.file or job.folder}: ' if unnamed else ''}{error}")
    return evaluated


def _describe(sweep: Sweep, job: Job) -> tuple[Path, Run, ResultFiles]:
    """A model's folder, its run and its files.

    Raises:
        ValueError: the checkpoint is missing or incomplete, or its style record is damaged.
    """
    folder = locate(job.model)
    check_whole(folder)
    recorded, asked = load_style(folder), sweep.run.style
    if asked and recorded and asked != recorded:
        say(f"warning: {folder} was trained with prompt style {recorded!r}; --prompt_style {asked} overrides it")
    usual = recorded or DEFAULT_STYLE
    run = replace(sweep.run, label=job.label, weights=fingerprint(folder), style=asked or usual)
    name = f"res_{run.name(usual, DTYPES[sweep.device])}{sweep.suffix}"
    return folder, run, ResultFiles(job.file or job.folder / name)


def _evaluate_model(
    sweep: Sweep,
    hashes: dict[str, str],
    measure: Callable[[], dict[str, int | str]],
    folder: Path,
    run: Run,
    files: ResultFiles,
) -> None:
    """Have one model answer all questions and write its results, unless they are there.

    Raises:
        DataError: questions cannot be asked, or a clip has changed.
        ValueError, OSError: the model cannot be loaded, or the results cannot be written.
    """
    differences = run_on_all(lambda: files.find_differences(run), main=True)
    if differences == [] and not sweep.force:
        say(f"{run.label}: finished before, skipped (--force repeats it)")
        return
    if differences:
        say(f"{files.results}: is of another run ({', '.join(differences)} differ): evaluated again")
    processor = run_on_all(lambda: load_processor(folder))
    questions = EncodedQuestions(sweep.benchmark.questions, run_on_all(measure), processor, run)
    missing = _find_missing(questions)
    questions = questions.without(missing)
    cut = sum(questions.samples[question.audio_path] > questions.window for question in questions.questions)
    if cut:
        say(f"{cut} clips are longer than the model's {questions.window / SAMPLE_RATE:g} s: cut, as the paper did")
    with _locked(files.lock):
        _answer(sweep, questions, folder, run, files)
        now = run_on_all(lambda: hash_clips(sweep.benchmark.questions))
        if changed := next((path for path in now if now[path] != hashes[path]), None):
            raise DataError(f"{changed}: the clip was replaced during the run; start it again")
        line = run_on_all(lambda: files.finish(run, sweep.benchmark, sorted(missing), cut), main=True)
    say(f"{run.label}: {line}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, in the first process for all.

    Raises:
        ValueError: another run holds it.
    """
    lock = FileLock(path, timeout=0)

    def acquire() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"{path.parent}: another run writes there; wait, or pass another --out_dir") from error

    run_on_all(acquire, main=True)
    try:
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # while it is held: filelock opens a file again that was removed meanwhile
            lock.release()


def _answer(sweep: Sweep, questions: EncodedQuestions, folder: Path, run: Run, files: ResultFiles) -> None:
    """Have the model answer the questions that have no answer yet; the answers stay in the partial files."""
    done, process = run_on_all(lambda: files.resume(run, sweep.force), main=True), processes()
    if done:
        say(f"{run.label}: {len(done)} answers are there already")
    # A batch is repeated as a whole, so that batches keep their shape.
    open_batches = [batch for batch in questions.batches() if not done.keys() >= set(questions.names(batch))]
    if not open_batches:
        return
    on_gpu = sweep.device == "cuda" and sweep.engine is complete_with
    device = torch.device(f"cuda:{process.local_process_index}" if on_gpu else "cpu")
    model = run_on_all(lambda: load_model(folder, getattr(torch, run.dtype), device))
    complete = run_on_all(lambda: sweep.engine(model, questions))

    def answer() -> None:
        with files.open_partial(run, process.process_index) as write:
            answer_batches(complete, questions, open_batches, write, run.label)

    run_on_all(answer)


def _find_missing(questions: EncodedQuestions) -> dict[str, str]:
    """Id -> why a question cannot be asked; a `DataError` if the run does not allow it, or if none can."""
    missing = questions.find_unusable()
    listed = [f"{id_}: {problem}" for id_, problem in missing.items()]
    count = f"{len(missing)} of {len(questions.questions)} questions cannot be asked"
    if missing and not questions.run.allow_missing:
        raise DataError(f"{count} (--allow_missing counts them as wrong):\n  {first_problems(listed)}")
    if missing and len(missing) == len(questions.questions):
        raise DataError(f"{count}, so there is nothing to evaluate:\n  {first_problems(listed)}")
    if missing:
        say(f"{count} and count as wrong:\n  " + "\n  ".join(listed))
    return missing
