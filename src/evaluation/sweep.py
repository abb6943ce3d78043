"""Several models on one benchmark, in one process or several: which is evaluated, in which order, by whom.

All processes go through the same models and answer their shares; the first one reads and writes what all go by. Leaves
out what the files look like (`results.py`) and how a question is answered (`answers.py`).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from dataset.audio import SAMPLE_RATE
from dataset.prompt import DEFAULT_STYLE, load_style
from dataset.questions import Benchmark
from dataset.rows import first_problems
from model.checkpoints import IncompleteCheckpoint, check_whole, fingerprint, label_of, load_model, locate
from model.qwen2_audio import load_processor

from .answers import Clips, EncodedQuestions, answer_batches, load_clips
from .results import ResultFiles, Run

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One model to evaluate, and where its results go."""

    model: str  # folder or hub name
    label: str  # in the table
    files: ResultFiles


def processes() -> PartialState:
    """The processes of this run. They exchange small objects only, so on any device their group is one of CPUs; one
    that waits for another's last batch must not give up on it."""
    return PartialState(cpu=True, timeout=timedelta(days=7))


def say(text: str) -> None:
    """Print a line to standard error, once for all processes."""
    if processes().is_main_process:
        print(text, file=sys.stderr, flush=True)


def from_main_process(compute: Callable[[], T]) -> T:
    """`compute()` of the first process, in all of them; a `ValueError` or `OSError` of it likewise."""
    outcome = [None]
    if processes().is_main_process:
        try:
            outcome = [compute()]
        except (ValueError, OSError) as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def make_jobs(
    models: list[str], results_name: str, out_dir: str | None = None, out_file: str | None = None
) -> list[Job]:
    """One job for each model, checkpoints in the order of their steps.

    Args:
        models: folders or hub names, each as MODEL or LABEL=MODEL.
        results_name: of the file of results, e.g. `res_mmau_mini.json`.
        out_dir: results go to its test_LABEL; by default the folder that holds the checkpoint.
        out_file: results of a single model go here instead.

    Raises:
        ValueError: two of them would write the same file.
    """
    jobs = []
    for given in models:
        label, model = None, given
        if "=" in given and not Path(given).exists():
            label, _, model = given.partition("=")
            if "/" in label:
                raise ValueError(f"{given}: no such folder, and {label!r} cannot be a label")
        label = label or label_of(model)
        folder = Path(out_dir) if out_dir else Path(model).parent if Path(model).exists() else Path("exp") / label
        results = Path(out_file) if out_file else folder / f"test_{label}" / results_name
        jobs.append(Job(model, label, ResultFiles(results)))
    if len({job.files for job in jobs}) < len(jobs):
        raise ValueError(
            "two models would write to the same file; give them labels (--model_path base=PATH ...) and --out_dir"
        )
    return sorted(jobs, key=lambda job: int(job.label) if job.label.isdecimal() else -1)


def run_sweep(
    benchmark: Benchmark,
    jobs: list[Job],
    run: Run,
    device: str,
    workers: int,
    allow_missing: bool = False,
    force: bool = False,
) -> int:
    """Evaluate all models, but those that are finished.

    Args:
        run: what is the same for all of them; the style None means each checkpoint's own.
        device: cuda or cpu.
        workers: that decode and encode clips ahead, for each process.
        allow_missing: questions that cannot be asked count as wrong instead of stopping the run.
        force: evaluate again what is finished.

    Returns:
        How many have results in the end.

    Raises:
        ValueError: questions cannot be asked, and `allow_missing` was not given.
    """
    say(benchmark.title)
    clips, evaluated = None, 0
    for job in jobs:
        try:
            job_run, finished = from_main_process(lambda job=job: _examine_job(benchmark, job, run))
        except ValueError as error:
            say(f"{job.label}: skipped. {error}")
            continue
        if finished and not force:
            say(f"{job.label}: finished before, skipped (--force repeats it)")
        else:
            clips = clips or load_clips(benchmark.questions, run.channels, workers)
            try:
                _evaluate_model(benchmark, clips, job, job_run, device, workers, allow_missing)
            except IncompleteCheckpoint as error:
                say(f"{job.label}: skipped. {error}")
                continue
        evaluated += 1
    return evaluated


def _examine_job(benchmark: Benchmark, job: Job, run: Run) -> tuple[Run, bool]:
    """A job's own run, and whether its results are there already.

    Raises:
        ValueError: the checkpoint is not there, or not whole, or its style record is damaged.
    """
    folder = locate(job.model)
    check_whole(folder)
    recorded = load_style(folder)
    if run.style and recorded and run.style != recorded:
        say(f"warning: {folder} was trained with prompt style {recorded!r}; --prompt_style {run.style} overrides it")
    run = replace(
        run,
        label=job.label,
        weights=fingerprint(folder),
        benchmark=benchmark.name,
        release=benchmark.release,
        questions=benchmark.digest,
        style=run.style or recorded or DEFAULT_STYLE,
    )
    differences = job.files.find_differences(run)
    if differences:
        say(f"{job.files.results}: is of another run ({', '.join(differences)} differ): evaluated again")
    return run, differences == []


def _evaluate_model(
    benchmark: Benchmark, clips: Clips, job: Job, run: Run, device: str, workers: int, allow_missing: bool
) -> None:
    """Ask one model all questions and write its results.

    Raises:
        ValueError: questions cannot be asked, and `allow_missing` was not given.
    """
    folder, state = locate(job.model), processes()
    questions = EncodedQuestions(benchmark.questions, clips, load_processor(folder), run)
    missing = questions.find_unusable()
    if missing:
        listed = [f"{id_}: {problem}" for id_, problem in missing.items()]
        if not allow_missing:
            raise ValueError(
                f"{len(missing)} of {len(benchmark.questions)} questions cannot be asked "
                f"(--allow_missing counts them as wrong):\n  {first_problems(listed)}"
            )
        say(f"{len(missing)} questions cannot be asked and count as wrong:\n  " + "\n  ".join(listed))
        questions = questions.without(missing)
    cut = questions.count_cut()
    if cut:
        say(f"{cut} clips are longer than the model's {questions.window / SAMPLE_RATE:g} s: cut, as the paper did")

    done = from_main_process(lambda: job.files.resume(run))
    if done:
        say(f"{job.label}: {len(done)} answers are there already")
    # A batch is done as a whole or again, so that batches keep their shape.
    names = [question.id for question in questions.questions]
    open_batches = [batch for batch in questions.batches() if not all(names[index] in done for index in batch)]
    if open_batches:  # by all processes, with a share or without, so that all know of a model that cannot be loaded
        place = torch.device(device, state.local_process_index if device == "cuda" else None)
        model = load_model(folder, getattr(torch, run.dtype), place)
        with job.files.open_partial(run, state.process_index) as write:
            answer_batches(model, questions, open_batches, workers, write, job.label)
    state.wait_for_everyone()
    say(f"{job.label}: {from_main_process(lambda: job.files.finish(run, benchmark, sorted(missing), cut))}")
