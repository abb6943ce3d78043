"""Evaluate several models on one benchmark, in one process or several. Each process answers its share of a model's
questions; the first one reads and writes the files of results. See also `results.py` (the files), `answers.py`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dataset.audio import SAMPLE_RATE
from dataset.prompt import DEFAULT_STYLE, load_style
from dataset.questions import Benchmark
from dataset.rows import DataError, first_problems
from model.qwen2_audio import load_processor

from .answers import Complete, EncodedQuestions, answer_batches, complete_with
from .checkpoints import check_model, check_whole, fingerprint, label_of, load_model, locate
from .clips import hash_clips, measure_clips
from .files import lock_file
from .mmau import evaluate
from .processes import processes, run_on_all, say
from .results import Identity, ResultFiles, Settings, digest

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
    # (model, questions) -> function that completes a batch. Other engines than the built-in one get a model on the CPU.
    engine: Callable[[PreTrainedModel, EncodedQuestions], Complete] = complete_with

    @cached_property
    def hashes(self) -> dict[str, str]:
        return hash_clips(self.benchmark.questions)

    @cached_property
    def samples(self) -> dict[str, int | str]:
        return measure_clips(self.benchmark.questions, self.settings.channels)


def make_jobs(models: list[str], out_dir: str | None = None, out_file: str | None = None) -> list[Job]:
    """One job for each model, checkpoints in the order of their steps. Raises a `ValueError` if two models would write
    the same files, or if a label cannot be part of a file's name.

    Args:
        models: folders or hub names, each as MODEL or LABEL=MODEL.
        out_dir: parent of test_LABEL, the folder of the results; by default the folder that holds the checkpoint.
        out_file: the results of a single model instead.
    """
    jobs = []
    for given in dict.fromkeys(models):
        label, model = label_of(given), given
        if "=" in given and not Path(given).exists():
            label, _, model = given.partition("=")
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
    for job in jobs:
        try:
            _evaluate(sweep, job)
            evaluated += 1
        except DataError:
            raise
        except (ValueError, OSError) as error:
            is_unnamed = isinstance(error, OSError) and not error.filename  # a full disk, for example
            say(f"{job.label}: skipped. {f'{job.file or job.folder}: ' if is_unnamed else ''}{error}")
    return evaluated


def _evaluate(sweep: Sweep, job: Job) -> None:
    """Have one model answer all questions and write its results, unless that is done. Raises as `run_sweep`, and a
    `ValueError` or `OSError` if the model cannot be loaded or the results cannot be written."""
    hashes = sweep.hashes  # all processes compute them together
    folder, files, differences = run_on_all(partial(_prepare, sweep, job), main=True)
    if differences == [] and not sweep.force:
        say(f"{job.label}: finished before, skipped (--force repeats it)")
        return
    if differences:
        say(f"{files.results}: belongs to another run ({', '.join(differences)} differ); evaluated again")
    processor = run_on_all(lambda: load_processor(folder))
    questions = EncodedQuestions(sweep.benchmark.questions, sweep.samples, processor, files.settings)
    if missing := questions.find_unusable():
        listed, allowed = [f"{id_}: {problem}" for id_, problem in missing.items()], sweep.settings.allow_missing
        count = f"{len(missing)} of {len(questions.questions)} questions cannot be asked"
        if not allowed or len(missing) == len(questions.questions):
            effect = ", so there is nothing to evaluate" if allowed else " (--allow_missing counts them as wrong)"
            raise DataError(f"{count}{effect}:\n  {first_problems(listed)}")
        say(f"{count} and count as wrong:\n  " + "\n  ".join(listed))
        questions = questions.without(missing)
    if cut := sum(questions.samples[question.audio_path] > questions.window for question in questions.questions):
        say(f"{cut} clips exceed the model's {questions.window / SAMPLE_RATE:g} s and are cut, as in the paper")
    path, remedy = files.results.with_name(f"{files.results.name}.lock"), "wait, or pass another --out_dir"
    lock = run_on_all(lambda: lock_file(path, remedy) if processes().is_main_process else None)
    try:
        _answer(sweep, questions, folder, files)
        now = hash_clips(sweep.benchmark.questions)
        if changed := next((path for path in now if now[path] != hashes[path]), None):
            raise DataError(f"{changed}: the clip was replaced during the run; start it again")
        say(f"{job.label}: {run_on_all(lambda: files.finish(sweep.benchmark, sorted(missing), cut), main=True)}")
    finally:
        if lock:
            path.unlink(missing_ok=True)  # before the release, after which another run may lock it
            lock.release()


def _prepare(sweep: Sweep, job: Job) -> tuple[Path, ResultFiles, list[str] | None]:
    """A model's folder, its files of results, and their differences from what is on disk."""
    folder, benchmark = locate(job.model), sweep.benchmark
    check_whole(folder)
    recorded, asked = load_style(folder), sweep.settings.style
    if asked and recorded and asked != recorded:
        say(f"warning: {folder} was trained with prompt style {recorded!r}; --prompt_style {asked} overrides it")
    usual = recorded or DEFAULT_STYLE
    settings = replace(sweep.settings, style=asked or usual)
    name = f"res_{settings.name(benchmark.name, usual, DTYPES[sweep.device])}{sweep.suffix}"
    records = json.dumps([question.record for question in benchmark.questions])
    clips = " ".join(sweep.hashes[question.audio_path] for question in benchmark.questions)
    identity = Identity(label=job.label, weights=fingerprint(folder), benchmark=benchmark.name,
                        release=benchmark.release, questions=benchmark.digest, records=digest(records.encode()),
                        clips=digest(clips.encode()))  # fmt: skip
    files = ResultFiles(job.file or job.folder / name, identity, settings)
    return folder, files, files.find_differences()


def _answer(sweep: Sweep, questions: EncodedQuestions, folder: Path, files: ResultFiles) -> None:
    """Have the model answer the questions that have no answer, and append the answers to the partial files."""
    if done := run_on_all(lambda: files.resume(sweep.force), main=True):
        say(f"{files.identity.label}: {len(done)} questions are answered already")
    # A batch is repeated as a whole, so that its shape is the same.
    batches = [batch for batch in questions.batches() if not done.keys() >= set(questions.names(batch))]
    if not batches:
        return
    on_gpu = sweep.device == "cuda" and sweep.engine is complete_with
    device = torch.device(f"cuda:{processes().local_process_index}" if on_gpu else "cpu")
    run_on_all(lambda: check_model(folder), main=True)
    model = run_on_all(lambda: load_model(folder, getattr(torch, files.settings.dtype), device))
    complete = run_on_all(lambda: sweep.engine(model, questions))
    append = partial(files.append, processes().process_index)
    run_on_all(lambda: answer_batches(complete, questions, batches, append, files.identity.label))
