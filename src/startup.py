"""Between a training script's command line and its model: the output folder is locked, the checkpoint to go on from
chosen, the data examined. All that a user can mend is said here, before the model is loaded."""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoConfig, ProcessorMixin, Trainer, TrainingArguments

from arguments import AudioModelConfig, DataArguments, RecipeParser, check_quantised, result_settings
from dataset.check import Rules, examine_evaluation_file, examine_training_file
from dataset.dataset import check_is_there, load_train_dataset
from dataset.lock import hold
from dataset.questions import Benchmark, load_questions
from dataset.rows import DataError, hash_file
from evaluation.mmau import evaluate
from evaluation.results import Completion, to_records
from evaluation.sweep import leave, processes, together
from launch.failures import recorded, stop_without_launcher
from launch.packages import find_missing_packages
from model.checkpoints import fingerprint, full_model, locate
from model.qwen2_audio import load_processor
from quiet import loading_shown, silence_libraries
from trainer.console import print_lines
from trainer.curves import PlotCurves
from trainer.fitting import check_devices, device_of, read_settings
from trainer.memory import Settings
from trainer.nodes import (
    check_same_clips,
    check_same_settings,
    on_each_disk,
    several_nodes,
    shares_disk,
    steps_on_all_nodes,
    use_own_disk,
)
from trainer.probe import ProbeFirst, explain_out_of_memory
from trainer.resume import (
    choose_start,
    describe_newest,
    execute_nothing,
    finish,
    note_launch,
    remove_checkpoints,
    resume_after_restart,
    step_of,
    strange_checkpoints,
)
from trainer.room import foresee_room
from trainer.sft_trainer import count_longest_answer
from trainer.stopping import RunEnded, StopOnSignal

# In the output folder:
LOCK = ".lock"  # one run at a time writes there
START = "start"  # the model that a run from an adapter checkpoint starts from


def load_training_data(
    data: DataArguments, args: TrainingArguments, processor: ProcessorMixin
) -> tuple[Dataset, dict[str, float]]:
    """The usable rows of the training file; what is dropped is reported in a table and written to `dropped.jsonl`. And
    what they take at most: tokens of a `prompt`, `seconds` of a clip.

    The main process examines every row and every clip's header; the others learn from it which lines to skip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: more than `max_dropped` of the rows are unusable, or there is none; the table says why.
    """

    def examine() -> tuple[list[int], dict[str, float]]:
        rules = Rules(
            data.prompt_style, processor, data.max_prompt_length, data.audio_channels,
            dropped_file=Path(args.output_dir) / "dropped.jsonl", progress=not args.disable_tqdm,
        )  # fmt: skip
        examination = examine_training_file(data.data_file, rules)
        print(examination.table(), flush=True)
        examination.check_share(data.max_dropped)
        return list(examination.dropped), {
            "prompt": examination.longest_prompt[0],
            "seconds": examination.longest,
        }

    dropped, longest = together(examine, main=True)
    return load_train_dataset(data.data_file, data.prompt_style, skip=set(dropped)), longest


def load_eval_questions(data: DataArguments, args: TrainingArguments, processor: ProcessorMixin) -> Benchmark:
    """The questions of --eval_file that can be asked: examined, reported (`dropped_eval.jsonl`) and limited in the same
    way as those to train on. As in evaluation, rows that are only not as they should be stay.

    Raises:
        ValueError: too many cannot be asked, or there would be no score.
    """

    def examine() -> list[int]:
        rules = Rules(
            data.prompt_style, processor, channels=data.audio_channels, lenient=True,
            dropped_file=Path(args.output_dir) / "dropped_eval.jsonl", progress=not args.disable_tqdm,
        )  # fmt: skip
        examination = examine_evaluation_file(args.eval_file, rules)
        print(examination.table(), flush=True)
        examination.check_share(data.max_dropped)
        return list(examination.dropped)

    benchmark = load_questions(args.eval_file, skip=set(together(examine, main=True)))
    if not benchmark.has_answers:
        raise ValueError(f"{args.eval_file}: holds no answers, so there is no accuracy; --eval_file needs them")
    evaluate(to_records(benchmark, {question.id: Completion("", False) for question in benchmark.questions}))
    return benchmark


def describe_run(data: DataArguments, args: TrainingArguments, model: AudioModelConfig, parsed: Sequence) -> dict:
    """All that decides a run's result: its flags, what is in the data file and the model, and how its state is cut.

    Raises:
        FileNotFoundError: there is no such data file.
        ValueError: the model is not there, or not whole.
    """
    content = hash_file(check_is_there(data.data_file))[:16]
    engine = "none"
    if args.deepspeed:
        stage = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
        engine = f"ZeRO-{stage} on {args.world_size} processes"
    weights = fingerprint(locate(model.model_name_or_path, model.model_revision))
    return result_settings(parsed) | {"data_file (content)": content, "model (weights)": weights, "engine": engine}


def merge_adapter(model: str, out: Path) -> str:
    """What training loads: the model itself, or `out`/start, in which an adapter checkpoint is merged into its base: by
    one process of each machine, while the others wait for it. New adapters (--use_peft) go on top of it."""
    if not (Path(model) / "adapter_config.json").is_file():
        return model
    if processes().is_local_main_process:
        full_model(Path(model), out / START)
    return str(out / START)


def describe_on_each_node(
    data: DataArguments, args: TrainingArguments, model: AudioModelConfig, parsed: Sequence
) -> dict:
    """`describe_run` of the first process, after each node's files and flags were held against one another.

    Raises:
        FileNotFoundError, ValueError: as `describe_run`; of a file that differs, both digests and nodes are named.
    """
    first = args.local_process_index == 0 if several_nodes() else args.process_index == 0
    settings = together(lambda: describe_run(data, args, model, parsed) if first else {})
    files: dict[str, str | None] = {
        "data_file (content)": f"--data_file {data.data_file}",
        "model (weights)": f"--model_name_or_path {model.model_name_or_path}",
        "eval_file (content)": f"--eval_file {args.eval_file}",
    }
    evaluated = {"eval_file (content)": hash_file(args.eval_file)[:16]} if args.eval_file else {}
    check_same_settings(settings | evaluated, parsed, files)
    return together(lambda: settings, main=True)


def check_enough(questions: int, args: TrainingArguments) -> None:
    """Raise a `ValueError` with numbers that work, where there are fewer usable questions than a step takes."""
    generations = getattr(args, "num_generations", 1)
    at_once = args.per_device_train_batch_size * args.world_size // generations
    needed = (
        getattr(args, "generation_batch_size", at_once * args.gradient_accumulation_steps * generations) // generations
    )
    if questions < needed:
        most = questions // at_once * at_once
        raise ValueError(
            f"{questions} usable questions are fewer than the {needed} that a step takes. What works: "
            + (f"--questions_per_step {most}" if most else f"fewer than {args.world_size} processes")
            + f", or {needed - questions} more questions"
        )


def check_packages(parsed: Sequence) -> None:
    """Raise a `ValueError` that names the packages which the flags need and which are not there, with the command."""
    if problems := find_missing_packages({flag: value for part in parsed for flag, value in vars(part).items()}):
        raise ValueError("; ".join(problems))


def check_memory(
    data: DataArguments, args: TrainingArguments, model: AudioModelConfig, longest: dict[str, Any]
) -> Settings:
    """Say what the run takes of each device, and return what that depends on.

    Raises:
        ValueError: it cannot fit a GPU; names settings that would.
    """
    kwargs = model.init_kwargs(args) | (getattr(args, "model_init_kwargs", None) or {})
    config = AutoConfig.from_pretrained(model.model_name_or_path, revision=kwargs["revision"], trust_remote_code=False)
    settings = replace(read_settings(args, model, kwargs["dtype"], data.freeze, config), **longest)
    devices = gather_object([device_of(args)])
    together(lambda: check_devices(config, settings, devices), main=True)
    return settings


@dataclass
class Prepared:
    """What a run needs beside its flags: examined, chosen and described before its model is loaded."""

    dataset: Dataset
    processor: ProcessorMixin
    eval_questions: Benchmark | None
    start: Path | None  # the checkpoint to go on from
    settings: dict  # all that decides the run's result
    memory: Settings


@recorded()
def run_training(parser: RecipeParser, build_trainer: Callable[..., Trainer]) -> None:
    """A training script from its command line to the saved model.

    Args:
        parser: what it parses begins with the `DataArguments` and ends with the recipe and the `AudioModelConfig`.
        build_trainer: called with the data set, the processor, the questions of --eval_file or None, and all that was
            parsed, in this order.
    """
    stop_without_launcher()
    with ExitStack() as held:
        try:
            parsed = parser.parse_args_and_config()
            run = prepare(parsed, held)
        except (ValueError, OSError) as error:  # the user's to mend: its message says how
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")
        if run is None:
            return leave()
        try:
            with loading_shown():
                trainer = build_trainer(run.dataset, run.processor, run.eval_questions, *parsed)
        except DataError as error:  # a reward that cannot be used
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")
        trainer.run_settings, trainer.memory_settings = run.settings, run.memory
        train(trainer, run.start)
        leave(getattr(trainer, "close", None))


def prepare(parsed: Sequence, held: ExitStack) -> Prepared | None:
    """Lock the output folder, choose the checkpoint to go on from, examine the data, calculate the memory; None for a
    run that is finished. Changes in the recipe and the model's flags what follows from all that.

    Args:
        parsed: as `run_training` has it.
        held: gets the lock.

    Raises:
        ValueError, OSError: the run cannot start as it is.
    """
    data, *_, args, model = parsed
    if not args.verbose:
        silence_libraries()
    check_packages(parsed)
    out = Path(args.output_dir)
    if args.eval_file:
        check_is_there(args.eval_file)
    if not shares_disk(out):
        use_own_disk(args)
    on_each_disk(lambda: held.enter_context(hold(out / LOCK)), args)
    processor = load_processor(model.model_name_or_path)
    settings = describe_on_each_node(data, args, model, parsed)
    everywhere = steps_on_all_nodes(args)
    vars(args).update(together(lambda: resume_after_restart(out, everywhere), main=True))
    start = on_each_disk(lambda: choose_start(args, settings, everywhere), args)
    if start and on_each_disk(lambda: finish(start, args), args):
        return None
    check_quantised(args, model)
    folder = together(lambda: merge_adapter(model.model_name_or_path, out))
    dataset, longest = load_training_data(data, args, processor)
    check_enough(len(dataset), args)
    eval_questions = load_eval_questions(data, args, processor) if args.eval_file else None
    check_same_clips(dataset)
    model.model_name_or_path = folder
    if not hasattr(args, "num_generations"):
        longest["completion"] = count_longest_answer(dataset, processor)
    memory = check_memory(data, args, model, longest)
    if args.overwrite_output_dir:
        on_each_disk(lambda: remove_checkpoints(strange_checkpoints(out, start)), args)
    on_each_disk(lambda: note_launch(out), args)
    return Prepared(dataset, processor, eval_questions, start, settings, memory)


def train(trainer: Trainer, start: Path | None) -> None:
    """Train and save the model. A signal ends it early, with a checkpoint; a run that took no step ends with a message
    and writes no model, which would be the one it started from.

    Args:
        start: the checkpoint to go on from.
    """
    args, stop = trainer.args, StopOnSignal()
    for callback in (stop, PlotCurves()):
        trainer.add_callback(callback)
    print_lines(trainer)
    try:
        execute_nothing(bool(args.deepspeed))
        foresee_room(trainer, step_of(start) if start else 0)
        if args.probe_memory or (args.probe_memory is None and args.device.type == "cuda"):
            trainer.add_callback(ProbeFirst(trainer))
        with explain_out_of_memory(trainer):
            trainer.train(resume_from_checkpoint=start and str(start))
        report_end(trainer, stop, start)
    except RunEnded as error:
        end_with(error, trainer)
    except DataError as error:  # in a loader's process with the traceback before it
        reason = str(error).rpartition("DataError: ")[2].strip()
        end_with(RunEnded(f"{reason}. {describe_newest(Path(args.output_dir))}"), trainer)
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # a mistake in one is "in DataLoader worker process"
            raise
        reason = f"a process that decodes clips ahead is gone ({str(error).partition('. ')[0]}): out of memory?"
        remedy = f"{describe_newest(Path(args.output_dir))}. --dataloader_num_workers 0 does without such processes"
        end_with(RunEnded(f"{reason} {remedy}"), trainer)


def report_end(trainer: Trainer, stop: StopOnSignal, start: Path | None) -> None:
    """Save the model of a run that has taken all its steps; say of another what it has come to."""
    state, out = trainer.state, trainer.args.output_dir
    if state.global_step <= (step_of(start) if start else 0):
        sys.exit("no step was taken, so no model is written; --max_steps and --num_train_epochs say how many to take")
    if stop.stopped and state.global_step < state.max_steps:
        remedy = "its weights only (--keep_optimizer none)" if trainer.args.save_only_model else "--resume goes on"
        saved = f"{out}/checkpoint-{state.global_step} is saved"
        trainer.accelerator.print(f"{stop.stopped}: stopped after step {state.global_step}; {saved}, {remedy}")
    else:
        trainer.save_result()


def end_with(error: RunEnded, trainer: Trainer) -> NoReturn:
    """End this process with a run's last words."""
    if error.everywhere:  # so that none is stopped by the launcher before it has come here
        trainer.accelerator.wait_for_everyone()
    sys.exit(f"{Path(sys.argv[0]).name}: {error}")
