"""Supervised fine-tuning: arguments -> data set -> trainer -> save. `sh run_sft.sh` starts it; `--help` lists flags.

The baseline that the paper compares GRPO with. Its settings were never published: the defaults here are ours, with as
many questions per step and steps as GRPO's.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from peft import get_peft_model
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from trl.trainer.utils import create_model_from_path

from baselines.sft_trainer import AudioSFTTrainer
from run import attach
from run.arguments import AudioModelConfig, DataArguments, RunArguments, parse
from run.startup import Prepared, run


@dataclass
class ChoiceDataArguments(DataArguments):
    """`DataArguments` with the paper's prompt for supervised fine-tuning."""

    prompt_style: Literal["choice", "answer"] = HfArg(
        default="choice",
        help="choice (the paper's Prompt <1>: the bare answer is learned) or answer (Prompt <2>).",
    )


@dataclass
class SFTRecipeConfig(RunArguments, TrainingArguments):
    """transformers' `TrainingArguments` with our defaults, and the accumulation derived from the world size."""

    output_dir: str = HfArg(default="exp/sft", aliases="--out_dir", help="Checkpoints go here.")
    per_device_train_batch_size: int = HfArg(default=1, help="Questions per forward pass.")
    learning_rate: float | None = HfArg(default=None, help="Peak, of AdamW. Default: 1e-5, with adapters 1e-4. Ours.")


def build(run: Prepared, data: ChoiceDataArguments, args: SFTRecipeConfig, config: AudioModelConfig) -> AudioSFTTrainer:
    """The trainer, its model loaded, with all attachments."""
    kwargs = config.init_kwargs(args)
    if quantisation := config.quantisation(args):
        kwargs["quantization_config"] = quantisation
    model = create_model_from_path(run.model, device_map=None, **kwargs)
    if peft_config := config.adapters():
        model = get_peft_model(model, peft_config)
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if peft_config else 1e-5
    trainer = AudioSFTTrainer(
        model, args, run.dataset, run.processor, data.audio_channels, data.freeze,
        eval_dataset=run.eval_questions and run.eval_questions.questions,
    )  # fmt: skip
    attach(trainer, run.settings, run.eval_questions)
    return trainer


if __name__ == "__main__":
    run(partial(parse, (ChoiceDataArguments, SFTRecipeConfig, AudioModelConfig)), build)
