"""Supervised fine-tuning: arguments -> data set -> trainer -> save. `sh run_sft.sh` starts it; `--help` lists flags.

The baseline that the paper compares GRPO with. Its settings were never published: the defaults here are ours, with as
many questions per step and steps as GRPO's.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from peft import get_peft_model
from transformers import ProcessorMixin, TrainingArguments
from trl import TrlParser, get_peft_config
from trl.trainer.utils import create_model_from_path

from arguments import AudioModelConfig, DataArguments, RunArguments
from dataset.questions import load_questions
from startup import run_training
from trainer.sft_trainer import AudioSFTTrainer


@dataclass
class ChoiceDataArguments(DataArguments):
    """`DataArguments` with the paper's prompt for supervised fine-tuning."""

    prompt_style: str = field(
        default="choice",
        metadata={
            "help": "choice (the paper's Prompt <1>: the bare answer is learned) or answer (Prompt <2>).",
            "choices": ["choice", "answer"],
        },
    )


@dataclass
class SFTRecipeConfig(RunArguments, TrainingArguments):
    """transformers' `TrainingArguments` with our defaults, and the accumulation derived from the world size."""

    output_dir: str = field(default="exp/sft", metadata={"help": "Checkpoints go here.", "aliases": ["--out_dir"]})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Questions per forward pass."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak, of AdamW. Default: 1e-5, with adapters 1e-4. Ours."}
    )
    lr_scheduler_type: str = field(default="linear", metadata={"help": "As in GRPO."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps. As in GRPO."})
    save_steps: float = field(default=100, metadata={"help": "Steps between checkpoints. As in GRPO."})
    save_only_model: bool = field(
        default=True, metadata={"help": "Checkpoints without optimizer state: smaller, but no resuming."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of metrics."})
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision. Default: unless --use_cpu or --fp16."})

    def __post_init__(self):
        self.settle(self.per_device_train_batch_size)
        super().__post_init__()


def build_trainer(
    dataset: Dataset,
    processor: ProcessorMixin,
    data: ChoiceDataArguments,
    args: SFTRecipeConfig,
    model_config: AudioModelConfig,
) -> AudioSFTTrainer:
    """The trainer, its model loaded; the data set has been examined."""
    init_kwargs = model_config.init_kwargs(args.bf16, args.deepspeed)
    model = create_model_from_path(model_config.model_name_or_path, device_map=None, **init_kwargs)
    if peft_config := get_peft_config(model_config):
        model = get_peft_model(model, peft_config)
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if peft_config else 1e-5
    questions = load_questions(args.eval_file) if args.eval_file else None
    return AudioSFTTrainer(model, args, dataset, processor, data.audio_channels, tuple(data.freeze), questions)


def make_parser() -> TrlParser:
    """Every flag: ours, `TrainingArguments`' and `ModelConfig`'s; `--config FILE.yaml` reads them from a file."""
    return TrlParser((ChoiceDataArguments, SFTRecipeConfig, AudioModelConfig))


if __name__ == "__main__":
    run_training(make_parser(), build_trainer)
