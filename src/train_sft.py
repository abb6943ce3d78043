"""Supervised fine-tuning: arguments -> data set -> trainer -> save. `sh run_sft.sh` starts it; `--help` lists flags.

The baseline that the paper compares GRPO with. Its settings were never published: the defaults here are ours, with as
many questions per step and steps as GRPO's.
"""

from dataclasses import dataclass

from datasets import Dataset
from peft import get_peft_model
from transformers import ProcessorMixin, TrainingArguments
from transformers.hf_argparser import HfArg
from trl.trainer.utils import create_model_from_path

from arguments import AudioModelConfig, DataArguments, RecipeParser, RunArguments
from dataset.questions import Benchmark
from startup import run_training
from trainer.sft_trainer import AudioSFTTrainer


@dataclass
class ChoiceDataArguments(DataArguments):
    """`DataArguments` with the paper's prompt for supervised fine-tuning."""

    prompt_style: str = HfArg(
        default="choice",
        help="choice (the paper's Prompt <1>: the bare answer is learned) or answer (Prompt <2>).",
        metadata={"choices": ["choice", "answer"]},
    )


@dataclass
class SFTRecipeConfig(RunArguments, TrainingArguments):
    """transformers' `TrainingArguments` with our defaults, and the accumulation derived from the world size."""

    output_dir: str = HfArg(default="exp/sft", aliases="--out_dir", help="Checkpoints go here.")
    per_device_train_batch_size: int = HfArg(default=1, help="Questions per forward pass.")
    learning_rate: float | None = HfArg(default=None, help="Peak, of AdamW. Default: 1e-5, with adapters 1e-4. Ours.")


def build_trainer(
    dataset: Dataset,
    processor: ProcessorMixin,
    eval_questions: Benchmark | None,
    data: ChoiceDataArguments,
    args: SFTRecipeConfig,
    config: AudioModelConfig,
) -> AudioSFTTrainer:
    """The trainer, its model loaded; the data set has been examined."""
    kwargs = config.init_kwargs(args)
    if quantisation := config.quantisation(args):
        kwargs["quantization_config"] = quantisation
    model = create_model_from_path(config.model_name_or_path, device_map=None, **kwargs)
    if peft_config := config.adapters():
        model = get_peft_model(model, peft_config)
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if peft_config else 1e-5
    return AudioSFTTrainer(
        model, args, dataset, processor, data.audio_channels, data.freeze, eval_questions=eval_questions
    )


def make_parser() -> RecipeParser:
    """Every flag: ours, `TrainingArguments`' and `ModelConfig`'s; `--config FILE.yaml` reads them from a file."""
    return RecipeParser((ChoiceDataArguments, SFTRecipeConfig, AudioModelConfig))


if __name__ == "__main__":
    run_training(make_parser(), build_trainer)
