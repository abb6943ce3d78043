"""A training script from its parsed command line to the saved model. What a user can change is reported before the
model is loaded."""

import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import SafetensorError
from transformers import ProcessorMixin, Trainer, TrainingArguments

from dataset.dataset import check_is_there, load_train_dataset
from dataset.questions import Benchmark, load_questions
from dataset.rows import DataError
from evaluation.checkpoints import check_model, full_model
from evaluation.files import hash_file, lock_file
from evaluation.identity import fingerprint, locate
from evaluation.mmau import evaluate
from evaluation.processes import leave, run_on_all
from evaluation.results import Completion, to_records
from model.qwen2_audio import load_processor

from .accuracy import to_metrics
from .arguments import DataArguments, check_optimizer
from .check import Rules, examine_evaluation_file, examine_training_file
from .checkpoints import (
    KeepCheckpoints,
    choose_start,
    finish,
    forbid_pickles,
    foreign_checkpoints,
    remove_checkpoints,
    result_settings,
    step_of,
)
from .launch import recorded
from .signals import RunEnded, StopOnSignal

LOCK = ".lock"  # in the output folder: one run at a time writes there
START = "start"  # in the output folder: the model that a run from an adapter checkpoint starts from


@dataclass
class Prepared:
    """What a run needs beside its flags: examined and chosen before its model is loaded."""

    model: str  # folder or hub name to load
    dataset: Dataset
    processor: ProcessorMixin
    eval_questions: Benchmark | None
    start: Path | None  # the checkpoint to resume from
    settings: dict  # what decides the run's result


def run(
    parse: Callable[[], tuple],
    build: Callable[..., Trainer],
    reward_files: Callable[..., Sequence[str]] = lambda *_: (),
) -> None:
    """Run a training script.

    Args:
        parse: returns the parsed command line, which begins with the `DataArguments` and ends with the recipe and the
            `AudioModelConfig`; raises a `ValueError` or `OSError` for a user's mistake.
        build: called with `Prepared` and all that was parsed; returns the trainer with its attachments.
        reward_files: called with all that was parsed; files whose content decides the result.
    """
    with recorded(), ExitStack() as held:
        try:
            parsed = parse()
            prepared = prepare(parsed, reward_files(*parsed), held)
            if prepared is None:
                return leave()
            trainer = build(prepared, *parsed)
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")
        train(trainer, prepared.start)
        leave(getattr(trainer, "close", None))


def prepare(parsed: Sequence, reward_files: Sequence[str], held: ExitStack) -> Prepared | None:
    """Lock the output folder, choose the checkpoint to resume from, examine the data; None for a finished run. Raises a
    `ValueError` or `OSError` if the run cannot start as it is."""
    data, *_, args, model = parsed
    out, folder = Path(args.output_dir), locate(model.model_name_or_path, model.model_revision)
    if not (args.use_cpu or torch.cuda.is_available()):
        raise ValueError("PyTorch finds no GPU; --use_cpu true trains without one, for small models")
    for file in (data.data_file, *([args.eval_file] if args.eval_file else [])):
        check_is_there(file)
    model.quantisation(args)
    check_optimizer(args)
    run_on_all(lambda: hold(out, held), main=True)
    settings = describe_run(parsed, reward_files, folder)
    restarted = int(os.environ.get("RUN_RESTART", 0)) > 0
    start = run_on_all(lambda: choose_start(args, settings, restarted), main=True)
    if start and run_on_all(lambda: finish(start, args), main=True):
        return None
    processor = load_processor(folder)
    dataset = load_training_data(data, args, processor)
    questions = load_eval_questions(data, args, processor) if args.eval_file else None
    name = model.model_name_or_path
    if (folder / "adapter_config.json").is_file():  # merged, since reference and new adapters are loaded from disk
        name = str(run_on_all(lambda: full_model(folder, out / START), main=True))
    if args.overwrite_output_dir and not (args.resume or restarted):
        run_on_all(lambda: remove_checkpoints(foreign_checkpoints(out, start)), main=True)
    return Prepared(name, dataset, processor, questions, start, settings)


def hold(out: Path, held: ExitStack) -> None:
    """Make and lock the output folder. A `ValueError` where another run holds it or it cannot be written."""
    if os.fsencode(out.resolve()).decode(errors="ignore") != str(out.resolve()):
        raise ValueError(f"{str(out)!r}: its path is not UTF-8, as model cards require; choose another OUT_DIR")
    try:
        held.callback(lock_file(out / LOCK, "wait for its end, or choose another OUT_DIR").release)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); choose another OUT_DIR") from error


def describe_run(parsed: Sequence, reward_files: Sequence[str], model: Path) -> dict:
    """All that decides a run's result: flags, the content of data, model and rewards, and how its state is split.
    Raises a `ValueError` if the model is damaged, or nodes do not share the output folder or the settings."""
    data, *_, args, _ = parsed
    engine = "none"
    if args.deepspeed:
        stage = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
        engine = f"ZeRO-{stage} on {args.world_size} processes"
    first, out = args.local_process_index == 0, Path(args.output_dir)
    marker = out / f".node-{args.process_index}"

    def describe() -> dict:
        out.mkdir(parents=True, exist_ok=True)  # a node without a shared disk does not have it yet
        marker.touch()
        check_model(model)
        contents = {"data_file (content)": hash_file(data.data_file)[:16], "model (weights)": fingerprint(model)}
        return result_settings(parsed, reward_files) | contents | {"engine": engine}

    own = run_on_all(lambda: describe() if first else None)
    described = gather_object([(socket.gethostname(), args.process_index, own)] if first else [])
    shared = gather_object([all((out / f".node-{rank}").exists() for _, rank, _ in described)])
    if first:
        marker.unlink()
    if not all(shared):
        raise ValueError(f"{out}: the nodes do not share this folder; set OUT_DIR to one on a shared disk")
    node, _, settings = described[0]
    for other, _, found in described[1:]:
        if name := next((name for name in settings | found if settings.get(name) != found.get(name)), None):
            raise ValueError(f"{name}: {settings.get(name)} on {node}, {found.get(name)} on {other}; make them equal")
    return settings


def load_training_data(data: DataArguments, args: TrainingArguments, processor: ProcessorMixin) -> Dataset:
    """The usable rows of the training file; the others are written to `dropped.jsonl`. Raises a `ValueError` if more
    than `max_dropped` of the rows are unusable, or fewer are left than a step takes."""
    rules = Rules(data.prompt_style, processor, data.max_prompt_length, data.audio_channels)
    dropped = examine(data.data_file, "dropped.jsonl", rules, examine_training_file, data, args)
    dataset = load_train_dataset(data.data_file, data.prompt_style, skip=dropped)
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    needed = getattr(args, "generation_batch_size", completions) // getattr(args, "num_generations", 1)
    if len(dataset) < needed:
        raise ValueError(
            f"{data.data_file}: {len(dataset)} usable questions are fewer than the {needed} of a step; add "
            f"{needed - len(dataset)}, or lower --questions_per_step"
        )
    return dataset


def load_eval_questions(data: DataArguments, args: TrainingArguments, processor: ProcessorMixin) -> Benchmark:
    """The questions of --eval_file that can be answered; the others are written to `dropped_eval.jsonl`.
    Raises a `ValueError` if too many are unusable, or the file holds no answers that can be scored."""
    rules = Rules(data.prompt_style, processor, channels=data.audio_channels, lenient=True)
    dropped = examine(args.eval_file, "dropped_eval.jsonl", rules, examine_evaluation_file, data, args)
    benchmark = load_questions(args.eval_file, skip=dropped)
    if not benchmark.has_answers:
        raise ValueError(f"{args.eval_file}: holds no answers, so there is no accuracy; add them")
    scores = evaluate(to_records(benchmark, {question.id: Completion("", False) for question in benchmark.questions}))
    if args.metric_for_best_model.removeprefix("eval_") not in (measured := to_metrics(scores)):
        raise ValueError(f"--metric_for_best_model {args.metric_for_best_model}: use one of {', '.join(measured)}")
    return benchmark


def examine(file: str, dropped: str, rules: Rules, by: Callable, data: DataArguments, args: TrainingArguments) -> set:
    """Row numbers that cannot be used, found by the first process, which prints a table with the reasons."""

    def find() -> set[int]:
        out = Path(args.output_dir) / dropped
        examination = by(file, replace(rules, dropped_file=out, progress=not args.disable_tqdm))
        print(examination.table(), flush=True)
        examination.check_share(data.max_dropped)
        return set(examination.dropped)

    return run_on_all(find, main=True)


def train(trainer: Trainer, start: Path | None) -> None:
    """Train and save the model. A signal ends the run early with a checkpoint; a run without a step writes no model."""
    args, found = trainer.args, {type(callback): callback for callback in trainer.callback_handler.callbacks}
    stop, keep = found[StopOnSignal], found[KeepCheckpoints]
    try:
        if start and args.deepspeed:
            forbid_pickles()
        if start:
            trainer.accelerator.print(f"resuming after step {step_of(start)}, from {start}", flush=True)
        trainer.train(resume_from_checkpoint=start and str(start))
        state, out = trainer.state, args.output_dir
        if state.global_step <= (step_of(start) if start else 0):
            sys.exit("no step was taken, so no model is written; raise --max_steps or --num_train_epochs")
        if stop.stopped and state.global_step < state.max_steps:
            remedy = "weights only (--keep_optimizer none)" if args.save_only_model else "--resume continues from it"
            trainer.accelerator.print(f"{stop.stopped}: {out}/checkpoint-{state.global_step} is saved; {remedy}")
        else:
            keep.writing = Path(out)
            trainer.save_model()
    except (RunEnded, DataError, FloatingPointError) as error:  # also no usable clip, a reward's value, NaN in sampling
        if getattr(error, "everywhere", False):  # so that the launcher stops none before it has come here
            trainer.accelerator.wait_for_everyone()
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except (RuntimeError, OSError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            sys.exit(explain_out_of_memory(trainer, error))
        if ended := keep.explain_failed_write(error):
            sys.exit(f"{Path(sys.argv[0]).name}: {ended}")
        raise


def explain_out_of_memory(trainer: Trainer, error: Exception) -> str:
    """The step, the size of its passes, and the flags that need less memory."""
    size = f"{trainer.args.per_device_train_batch_size} per pass"
    return (
        f"out of memory in step {trainer.state.global_step + 1} ({size}): {str(error).strip().splitlines()[0]}\n"
        "These need less: --activation_checkpointing true, --steps_per_generation 1, --use_peft true, "
        "CONFIG=conf/ds_zero3.json"
    )
