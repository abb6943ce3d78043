"""Between a training script's command line and its model: the data examined, the checkpoint to resume from checked."""

import sys
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers import ProcessorMixin, Trainer, TrainingArguments
from trl import TrlParser

from arguments import DataArguments
from dataset.check import Rules, examine_training_file
from dataset.dataset import load_train_dataset
from dataset.questions import load_questions
from evaluation.sweep import together
from model.qwen2_audio import load_processor


def load_training_data(data: DataArguments, args: TrainingArguments, processor: ProcessorMixin) -> Dataset:
    """The usable rows of the training file; what is dropped is reported in a table and written to `dropped.jsonl`.

    The main process examines every row and every clip's header; the others learn from it which lines to skip.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: more than `max_dropped` of the rows are unusable, or there is none; the table says why.
    """

    def examine() -> list[int]:
        rules = Rules(
            data.prompt_style, processor, data.max_prompt_length, data.audio_channels,
            dropped_file=Path(args.output_dir) / "dropped.jsonl", progress=not args.disable_tqdm,
        )  # fmt: skip
        examination = examine_training_file(data.data_file, rules)
        print(examination.table(), flush=True)
        examination.check_share(data.max_dropped)
        return list(examination.dropped)

    return load_train_dataset(data.data_file, data.prompt_style, skip=set(together(examine, main=True)))


def check_resumable(folder: Path) -> None:
    """Raise a `ValueError` unless `folder` is a checkpoint with optimizer state: without, a run would start over."""
    if not (folder / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {folder}: is no checkpoint")
    if not (folder / "optimizer.pt").is_file() and not any(folder.glob("global_step*")):  # the latter is DeepSpeed's
        raise ValueError(
            f"--resume_from_checkpoint {folder}: holds weights only; only runs with --save_only_model false can be "
            f"continued. --model_name_or_path {folder} starts a new run from its weights"
        )


def run_training(parser: TrlParser, build_trainer: Callable[..., Trainer]) -> None:
    """A training script from its command line to the saved model.

    Args:
        parser: what it parses begins with the `DataArguments` and ends with the recipe and the `AudioModelConfig`.
        build_trainer: called with the data set, the processor, the questions of --eval_file or None, and all that was
            parsed, in this order.
    """
    try:
        parsed = parser.parse_args_and_config()
        data, *_, args, model = parsed
        if args.resume_from_checkpoint:
            check_resumable(Path(args.resume_from_checkpoint))
        eval_questions = load_questions(args.eval_file) if args.eval_file else None
        processor = load_processor(model.model_name_or_path)
        dataset = load_training_data(data, args, processor)
    except (ValueError, FileNotFoundError) as error:  # the user's to mend: the message says how, a traceback would not
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    trainer = build_trainer(dataset, processor, eval_questions, *parsed)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.end()  # processes that exit with a process group open may abort
