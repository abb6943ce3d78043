"""Evaluate several models on one benchmark, in one process or several. Each process answers its share of a model's
questions; the first one reads and writes the files of results. See also `results.py` (the files), `answers.py`."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from dataset.audio import SAMPLE_RATE
from dataset.prompt import DEFAULT_STYLE, load_style
from dataset.questions import Benchmark
from dataset.rows import DataError, first_problems
from model.qwen2_audio import load_processor

from .answers import EncodedQuestions, answer_batches
from .checkpoints import check_model, check_whole, label_of, load_model
from .clips import hash_clips, measure_clips
from .files import lock_file
from .identity import fingerprint, locate
from .mmau import evaluate
from .processes import processes, run_on_all, say
from .results import ResultFiles, Settings, describe

DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # default of the weights on each device


@dataclass(frozen=True)
class Job:
    """One model to evaluate, and where its results go."""

    model: str  # folder or hub name
    label: str  # in the table
    folder: Path  # of the results
    file: Path | None = None  # of the results, instead of the usual name in `folder`


@dataclass(frozen=True)
class Sweep:
    """What all models of a sweep have in common."""

    benchmark: Benchmark
    settings: Settings
    suffix: str = ".json"  # of the result files
    device: str = "cpu"  # or cuda
    force: bool = False  # repeat finished evaluations

    @cached_property
    def samples(self) -> dict[str, int | str]:
        return measure_clips(self.benchmark.questions, self.settings.channels)


def make_jobs(models: list[str], out_dir: str | None = None, out_file: str | None = None) -> list[Job]:
    """One job for each folder or hub name, given as MODEL or LABEL=MODEL; checkpoints in the order of their steps.
    Results go to `out_dir`/test_LABEL, by default beside the model, or those of a single model to `out_file`. Raises a
    `ValueError` if two models would write the same files, or if a label cannot be part of a file's name."""
    jobs = []
    for given in dict.fromkeys(models):
        label, separator, model = given.partition("=")
        if not separator or Path(given).exists():
            label, model = "", given
        if "/" in label:
            raise ValueError(f"{given}: no such folder, and {label!r} cannot be a label")
        label = label or label_of(model)
        folder = Path(out_dir) if out_dir else Path(model).parent if Path(model).exists() else Path("exp") / label
        jobs.append(Job(model, label, folder / f"test_{label}", Path(out_file) if out_file else None))
    if len({job.file or job.folder for job in jobs}) < len(jobs):
        raise ValueError("two models would write the same files; pass --model_path LABEL=PATH ... and --out_dir")
    return sorted(jobs, key=lambda job: int(job.label) if job.label.isdecimal() else -1)


def run_sweep(sweep: Sweep, jobs: list[Job]) -> int:
    """Evaluate all models that are not finished, and return the number of models that have results. Models that cannot
    be evaluated are reported and skipped. Raises a `ValueError` if the rows cannot be scored, and a `DataError` if
    questions cannot be asked although the settings require it."""
    benchmark, evaluated = sweep.benchmark, 0
    say(benchmark.title)
    if benchmark.faults:
        count = f"warning: {len(benchmark.faults)} of {len(benchmark.questions)} rows are faulty"
        say(f"{count}; they are asked and counted nevertheless:\n  {first_problems(benchmark.faults)}")
    if benchmark.has_answers:  # rows that cannot be scored fail now instead of after hours
        evaluate([question.record | {"model_output": ""} for question in benchmark.questions])
    hashes = hash_clips(benchmark.questions)  # by all processes together
    for job in jobs:
        try:
            _evaluate(sweep, job, hashes)
            evaluated += 1
        except DataError:
            raise
        except (ValueError, OSError) as error:
            is_unnamed = isinstance(error, OSError) and not error.filename  # a full disk, for example
            say(f"{job.label}: skipped. {f'{job.file or job.folder}: ' if is_unnamed else ''}{error}")
    return evaluated


def _evaluate(sweep: Sweep, job: Job, hashes: dict[str, str]) -> None:
    """Have one model answer all questions and write its results, unless that is done. Raises as `run_sweep`, and a
    `ValueError` or `OSError` if the model cannot be loaded or the results cannot be written."""
    folder, settings, files, differences = run_on_all(partial(_prepare, sweep, job, hashes), main=True)
    if differences == [] and not sweep.force:
        say(f"{job.label}: finished before, skipped (--force repeats it)")
        return
    if differences:
        say(f"{files.results}: belongs to another run ({', '.join(differences)} differ); evaluated again")
    processor = run_on_all(lambda: load_processor(folder))
    questions = EncodedQuestions(sweep.benchmark.questions, sweep.samples, processor, settings)
    if missing := questions.find_unusable():
        count = f"{len(missing)} of {len(questions.questions)} questions cannot be asked"
        if len(missing) == len(questions.questions) or not settings.allow_missing:
            remedy = "nothing is left to ask" if settings.allow_missing else "--allow_missing counts them as wrong"
            raise DataError(f"{count}; {remedy}:\n  {first_problems(missing.values())}")
        say("\n  ".join([f"{count} and count as wrong:", *missing.values()]))
        questions = questions.without(missing)
    if cut := sum(questions.samples[question.audio_path] > questions.window for question in questions.questions):
        say(f"{cut} clips exceed the model's {questions.window / SAMPLE_RATE:g} s and are cut, as in the paper")
    path, remedy = files.results.with_name(f"{files.results.name}.lock"), "wait, or pass another --out_dir"
    lock = run_on_all(lambda: lock_file(path, remedy) if processes().is_main_process else None)
    try:
        if done := run_on_all(lambda: files.resume(sweep.force), main=True):
            say(f"{job.label}: {len(done)} questions are answered already")
        # A batch is repeated as a whole, so that its shape is the same.
        if batches := [batch for batch in questions.batches() if not done.keys() >= set(questions.names(batch))]:
            device = torch.device(f"cuda:{processes().local_process_index}" if sweep.device == "cuda" else "cpu")
            run_on_all(lambda: check_model(folder), main=True)
            model = run_on_all(lambda: load_model(folder, getattr(torch, settings.dtype), device))
            append = partial(files.append, processes().process_index)
            run_on_all(lambda: answer_batches(model, questions, batches, append, job.label))
        now = hash_clips(sweep.benchmark.questions)
        if changed := next((path for path in now if now[path] != hashes[path]), None):
            raise DataError(f"{changed}: the clip was replaced during the run; start it again")
        say(f"{job.label}: {run_on_all(lambda: files.finish(sweep.benchmark, sorted(missing), cut), main=True)}")
    finally:
        if lock:
            path.unlink(missing_ok=True)  # before the release, after which another run may lock it
            lock.release()


def _prepare(sweep: Sweep, job: Job, hashes: dict[str, str]) -> tuple[Path, Settings, ResultFiles, list[str] | None]:
    """A model's folder, settings and files of results, and their differences from what is on disk."""
    folder, benchmark, asked = locate(job.model), sweep.benchmark, sweep.settings.style
    check_whole(folder)
    recorded = load_style(folder)
    if asked and recorded and asked != recorded:
        say(f"warning: {folder} was trained with prompt style {recorded!r}; --prompt_style {asked} overrides it")
    usual = recorded or DEFAULT_STYLE
    settings = replace(sweep.settings, style=asked or usual)
    name = f"res_{settings.name(benchmark.name, usual, DTYPES[sweep.device])}{sweep.suffix}"
    described = describe(job.label, fingerprint(folder), benchmark, hashes, settings)
    files = ResultFiles(job.file or job.folder / name, described)
    return folder, settings, files, files.find_differences()
