"""Several models on one benchmark, in one process or several: which is evaluated, in which order, by whom.

All processes go through the same models and answer their shares; the first one reads and writes what all go by. Leaves
out what the files look like (`results.py`) and how a question is answered (`answers.py`).
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from dataset.audio import SAMPLE_RATE
from dataset.lock import hold
from dataset.prompt import DEFAULT_STYLE, load_style
from dataset.questions import Benchmark
from dataset.rows import DataError, first_problems
from model.checkpoints import check_whole, fingerprint, label_of, load_model, locate
from model.qwen2_audio import load_processor
from model.vllm_engine import GreedyEngine

from .answers import Clips, EncodedQuestions, answer_batches, hash_clips, load_clips
from .mmau import evaluate
from .results import Completion, ResultFiles, Run, digest, to_records

T = TypeVar("T")
SETTLED = 0.5  # s
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # of the weights, if nothing else is asked for


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
    run: Run  # the style None means each checkpoint's own
    suffix: str = ".json"  # of the files of results
    device: str = "cpu"  # or cuda
    workers: int = 1  # that decode and encode clips ahead, for each process
    force: bool = False  # evaluate again what is finished
    vllm: GreedyEngine | None = None  # answers in the models' place


def processes() -> PartialState:
    """The processes of this run. They exchange small objects only, so on any device their group is one of CPUs; one
    that waits for another's last batch must not give up on it."""
    return PartialState(cpu=True, timeout=timedelta(days=7))


def leave(close: Callable[[], None] | None = None) -> None:
    """Leave the group of processes, all at the same time: who exits with it open may abort, and the launcher ends the
    others as soon as one is gone with a status. `close` ends what uses the group, and is called before.

    Gloo's threads may not have let go of the last collective's tensors, for which they need Python's lock. A group that
    is destroyed meanwhile holds the lock and waits for them for ever: seen in torch 2.13, at the end of a run.
    """
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        time.sleep(SETTLED)
    if close:
        close()
    state.destroy_process_group()


def say(text: str) -> None:
    """Print a line to standard error, once for all processes."""
    if processes().is_main_process:
        print(text, file=sys.stderr, flush=True)


def together(compute: Callable[[], T], main: bool = False) -> T:
    """`compute()` in every process, or with `main` in the first one, whose outcome all get. A `ValueError` or `OSError`
    of one is raised in all, so that none waits for another that has gone on."""
    outcome: Any = None
    error: ValueError | OSError | None = None
    if not main or processes().is_main_process:
        try:
            outcome = compute()
        except (ValueError, OSError) as raised:
            error = raised
    for found in gather_object([error]):
        if found is not None:
            raise found
    return broadcast_object_list([outcome])[0] if main else outcome


def make_jobs(models: list[str], out_dir: str | None = None, out_file: str | None = None) -> list[Job]:
    """One job for each model, checkpoints in the order of their steps.

    Args:
        models: folders or hub names, each as MODEL or LABEL=MODEL.
        out_dir: results go to its test_LABEL; by default the folder that holds the checkpoint.
        out_file: results of a single model go here instead.

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
    """Evaluate all models, but those that are finished. One that cannot be evaluated is named and skipped.

    Returns:
        How many have results in the end.

    Raises:
        ValueError: the rows cannot be scored.
        DataError: questions cannot be asked, and the run does not allow it.
    """
    benchmark, evaluated = sweep.benchmark, 0
    say(benchmark.title)
    if benchmark.faults:
        count = f"warning: {len(benchmark.faults)} of {len(benchmark.questions)} rows are not as they should be"
        say(f"{count}; they are asked and counted all the same:\n  {first_problems(benchmark.faults)}")
    if benchmark.has_answers:  # what could not be scored in the end shall not be asked for hours
        evaluate(to_records(benchmark, {question.id: Completion("", False) for question in benchmark.questions}))
    hashes = together(lambda: hash_clips(benchmark.questions))
    clips = cache(lambda: load_clips(benchmark.questions, sweep.run.channels))  # unless all is finished
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
            folder, run, files = together(partial(_describe, sweep, job), main=True)
            _evaluate_model(sweep, hashes, clips, folder, run, files)
            evaluated += 1
        except DataError:
            raise
        except (ValueError, OSError) as error:
            unnamed = isinstance(error, OSError) and not error.filename  # as of a full disk
            say(f"{job.label}: skipped. {f'{job.file or job.folder}: ' if unnamed else ''}{error}")
    return evaluated


def _describe(sweep: Sweep, job: Job) -> tuple[Path, Run, ResultFiles]:
    """A model's folder, its own run, and the files of it.

    Raises:
        ValueError: the checkpoint is not there, or not whole, or its style record is damaged.
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
    sweep: Sweep, hashes: dict[str, str], load: Callable[[], Clips], folder: Path, run: Run, files: ResultFiles
) -> None:
    """Ask one model all questions and write its results, unless they are there.

    Raises:
        DataError: questions cannot be asked, or a clip is not what it was.
        ValueError, OSError: the model cannot be loaded, or the results not written.
    """
    differences = together(lambda: files.find_differences(run), main=True)
    if differences == [] and not sweep.force:
        say(f"{run.label}: finished before, skipped (--force repeats it)")
        return
    if differences:
        say(f"{files.results}: is of another run ({', '.join(differences)} differ): evaluated again")
    processor = together(lambda: load_processor(folder))
    questions = EncodedQuestions(sweep.benchmark.questions, together(load), processor, run)
    missing = _find_missing(questions)
    questions = questions.without(missing)
    cut = questions.count_cut()
    if cut:
        say(f"{cut} clips are longer than the model's {questions.window / SAMPLE_RATE:g} s: cut, as the paper did")
    with ExitStack() as held:
        together(lambda: held.enter_context(hold(files.lock)), main=True)
        _answer(sweep, questions, folder, run, files)
        now = together(lambda: hash_clips(sweep.benchmark.questions))
        if changed := next((path for path in now if now[path] != hashes[path]), None):
            raise DataError(f"{changed}: the clip was replaced during the run; start it again")
        line = together(lambda: files.finish(run, sweep.benchmark, sorted(missing), cut), main=True)
    say(f"{run.label}: {line}")


def _answer(sweep: Sweep, questions: EncodedQuestions, folder: Path, run: Run, files: ResultFiles) -> None:
    """Have the model answer what is not answered yet; the answers stay in the partial files."""
    done, state, vllm = together(lambda: files.resume(run, sweep.force), main=True), processes(), sweep.vllm
    if done:
        say(f"{run.label}: {len(done)} answers are there already")
    # A batch is done as a whole or again, so that batches keep their shape.
    names = [question.id for question in questions.questions]
    open_batches = [batch for batch in questions.batches() if not all(names[index] in done for index in batch)]
    if not open_batches:
        return
    place = torch.device("cpu" if vllm or sweep.device == "cpu" else f"cuda:{state.local_process_index}")
    model = together(lambda: load_model(folder, getattr(torch, run.dtype), place))
    if vllm:
        model = together(lambda: vllm.take(model, sweep.device == "cpu", run.batch_size))

    def answer() -> None:
        with files.open_partial(run, state.process_index) as write:
            answer_batches(model, questions, open_batches, sweep.workers, write, run.label)

    together(answer)


def _find_missing(questions: EncodedQuestions) -> dict[str, str]:
    """Id -> what keeps a question from being asked; a `DataError` where that is not allowed, or true of all."""
    missing = questions.find_unusable()
    listed = [f"{id_}: {problem}" for id_, problem in missing.items()]
    count = f"{len(missing)} of {len(questions)} questions cannot be asked"
    if missing and not questions.run.allow_missing:
        raise DataError(f"{count} (--allow_missing counts them as wrong):\n  {first_problems(listed)}")
    if missing and len(missing) == len(questions):
        raise DataError(f"{count}, so there is nothing to evaluate:\n  {first_problems(listed)}")
    if missing:
        say(f"{count} and count as wrong:\n  " + "\n  ".join(listed))
    return missing
