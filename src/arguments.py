"""What the training scripts share of their command lines: data, model, and how many forward passes make a step."""

import os
from dataclasses import dataclass, field

from trl import ModelConfig

from dataset.audio import CHANNELS
from dataset.encode import MAX_PROMPT_LENGTH
from dataset.prompt import DEFAULT_STYLE, STYLES
from model.qwen2_audio import PARTS


@dataclass
class DataArguments:
    """What to train on."""

    data_file: str = field(
        default="data/AVQA/train_qa.data", metadata={"help": "JSONL of questions; data/README.md shows the format."}
    )
    prompt_style: str = field(
        default=DEFAULT_STYLE,
        metadata={"help": "What the prompt asks for: the paper's Prompt <1>, <2> or <3>.", "choices": list(STYLES)},
    )
    max_prompt_length: int = field(
        default=MAX_PROMPT_LENGTH,
        metadata={"help": "Tokens, audio included (25 a second). Longer prompts are dropped. Paper: 512, by cutting."},
    )
    audio_channels: str = field(
        default="first", metadata={"help": "Channel(s) of a clip to hear. Paper: first.", "choices": list(CHANNELS)}
    )
    max_dropped: float = field(
        default=0.1, metadata={"help": "Share of the rows that may be unusable; more stop the run before it begins."}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Parts not to train. Paper: none.", "choices": list(PARTS)}
    )


@dataclass
class AudioModelConfig(ModelConfig):
    """TRL's `ModelConfig` with the paper's model, and adapters on the layers that both its halves have."""

    model_name_or_path: str = field(
        default="Qwen/Qwen2-Audio-7B-Instruct", metadata={"help": "Hub name or folder of a Qwen2-Audio model."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Weights are loaded as this type. Default: bfloat16 under DeepSpeed with bf16, whose optimizer "
            "keeps float32 weights of its own; else float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Layers that get adapters with --use_peft true. Not published by the paper."},
    )

    def init_kwargs(self, bf16: bool, deepspeed: str | None) -> dict:
        """Keyword arguments for `from_pretrained`, given the run's precision and engine."""
        return {
            "revision": self.model_revision,
            "attn_implementation": self.attn_implementation,
            "dtype": self.dtype or ("bfloat16" if bf16 and deepspeed else "float32"),
        }


@dataclass
class RunArguments:
    """What both recipes add to transformers' `TrainingArguments`; to stand before them as a base class."""

    deepspeed: str | None = field(
        default=None, metadata={"help": "DeepSpeed settings, e.g. conf/ds_zero2.json.", "aliases": ["--config_path"]}
    )
    questions_per_step: int = field(default=16, metadata={"help": "Questions per optimizer step. Paper: 16."})
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Default: whatever makes questions_per_step on this number of processes."}
    )
    eval_file: str | None = field(
        default=None,
        metadata={"help": "Questions in MMAU's or AVQA's format, asked every eval_steps; default: save_steps."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained parameter takes part in every step: no need to look."}
    )
    use_wandb: bool = field(default=False, metadata={"help": "Short for --report_to wandb."})

    def settle(self, questions_per_pass: int) -> None:
        """Fill in what follows from other settings, before transformers' own checks.

        Args:
            questions_per_pass: per process and forward pass.
        """
        if self.use_wandb:
            self.report_to = "wandb"
        if self.bf16 is None:
            self.bf16 = not (self.use_cpu or self.fp16)
        if self.gradient_accumulation_steps is None:
            self.gradient_accumulation_steps = derive_accumulation(self.questions_per_step, questions_per_pass)
        if self.eval_file is not None:
            if self.eval_strategy == "no":
                self.eval_strategy = "steps"
            if self.eval_steps is None:
                self.eval_steps = self.save_steps
            if self.metric_for_best_model is None:
                self.metric_for_best_model, self.greater_is_better = "accuracy", True


def derive_accumulation(questions: int, per_pass: int) -> int:
    """Forward passes per optimizer step, so that `questions` questions make one step on any number of processes.

    >>> derive_accumulation(questions=16, per_pass=1)  # on one process
    16

    Args:
        questions: per optimizer step, over all processes.
        per_pass: questions per process and forward pass.

    Raises:
        ValueError: the numbers do not divide; names some that do.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's; asking torch would start its process group
    at_once = per_pass * processes
    if questions % at_once == 0:
        return questions // at_once
    lower, upper = questions // at_once * at_once, (questions // at_once + 1) * at_once
    working = [n for n in range(1, questions + 1) if questions % (n * per_pass) == 0]
    raise ValueError(
        f"{questions} questions per step cannot be split evenly over {processes} processes with {per_pass} at once. "
        f"What works: --questions_per_step {f'{lower} or ' if lower else ''}{upper}"
        + (f", or {', '.join(map(str, working))} processes" if working else "")
        + (", or a smaller --per_device_train_batch_size" if per_pass > 1 else "")
    )
