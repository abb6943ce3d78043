"""What the training scripts share of their command lines: data, model, schedule, and the passes that make a step."""

import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import yaml
from peft import PeftConfig
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg
from trl import ModelConfig, TrlParser, get_peft_config

from dataset.encode import MAX_PROMPT_LENGTH
from dataset.prompt import DEFAULT_STYLE
from model.qwen2_audio import HEAD, NOT_QUANTISED, PARTS
from trainer.shared_prompt import ATTENTION

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# TRL's and transformers' flags that these trainers do not take -> why, or what to use.
REFUSED = {
    "trust_remote_code": "code that comes with a model is never executed",
    "fsdp": "not supported; CONFIG=conf/ds_zero3.json splits a model",
    "cast_lm_head_to_fp32": "not implemented for Qwen2-Audio",
    "label_smoothing_factor": "not implemented for these losses",
}


@dataclass
class DataArguments:
    """What to train on."""

    data_file: str = HfArg(default="data/AVQA/train_qa.data", help="JSONL of questions, as data/README.md shows.")
    prompt_style: Literal["choice", "answer", "think"] = HfArg(default=DEFAULT_STYLE, help="Prompt <1>, <2> or <3>.")
    max_prompt_length: int = HfArg(
        default=MAX_PROMPT_LENGTH, help="Tokens, 25 a second of audio. Longer are dropped. Paper: 512, by cutting."
    )
    audio_channels: Literal["first", "mean"] = HfArg(default="first", help="Channel(s) that are used. Paper: first.")
    max_dropped: float = HfArg(default=0.1, help="Share of the rows that may be unusable; more stop the run.")
    freeze: list[str] = HfArg(default_factory=list, help="Not trained. Paper: none.", metadata={"choices": list(PARTS)})

    def __post_init__(self):
        if set(PARTS) <= set(self.freeze):
            raise ValueError(f"--freeze {' '.join(self.freeze)}: nothing is left to train")


@dataclass
class AudioModelConfig(ModelConfig):
    """TRL's `ModelConfig` with the paper's model, and adapters on the layers that both its halves have."""

    model_name_or_path: str = HfArg(default="Qwen/Qwen2-Audio-7B-Instruct", help="Hub name or folder of a Qwen2-Audio.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = HfArg(
        default=None, help="Of the weights. Default: bfloat16 with bf16 under DeepSpeed or if quantised, else float32."
    )
    lora_dropout: float = HfArg(default=0.0, help="Of adapters. Above 0, the policy differs from the one that sampled.")
    lora_target_modules: list[str] | None = HfArg(
        default_factory=lambda: list(LINEAR_LAYERS), help="Layers with adapters. Not published by the paper."
    )

    def __post_init__(self):
        if self.attn_implementation not in (None, *ATTENTION):
            raise ValueError(f"--attn_implementation {self.attn_implementation}: use one of {', '.join(ATTENTION)}")
        if HEAD in (self.lora_target_modules or ()):
            raise ValueError(f"--lora_target_modules {HEAD}: its weights make the log-probs without adapters; omit it")
        super().__post_init__()
        if isinstance(self.lora_target_modules, str) and self.lora_target_modules.isidentifier():
            self.lora_target_modules = [self.lora_target_modules]  # TRL's string is a regular expression for PEFT

    def adapters(self) -> PeftConfig | None:
        """The adapters to train, which record their base's revision on the hub; None without --use_peft."""
        config = get_peft_config(self)
        if config and self.model_revision != "main" and not os.path.isdir(self.model_name_or_path):
            config.revision = self.model_revision
        return config

    def init_kwargs(self, args: TrainingArguments) -> dict:
        """Keyword arguments for `from_pretrained`, given the run's precision and engine."""
        frozen = self.load_in_4bit or self.load_in_8bit  # all but the adapters, which are float32
        return {
            "revision": self.model_revision,
            "attn_implementation": self.attn_implementation,
            "dtype": self.dtype or ("bfloat16" if args.bf16 and (args.deepspeed or frozen) else "float32"),
            "use_safetensors": True,
        }

    def quantisation(self, args: TrainingArguments) -> BitsAndBytesConfig | None:
        """How the base model's layers are stored in 4 or 8 bits, for `from_pretrained`; None: they are not. Raises a
        `ValueError` if such a model cannot be trained with these settings."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        flag = f"--load_in_{4 if self.load_in_4bit else 8}bit true"
        if not self.use_peft:
            raise ValueError(f"{flag} stores the weights in too few bits to train them; add --use_peft true (LoRA)")
        if args.deepspeed and args.hf_deepspeed_config.is_zero3():
            raise ValueError(f"{flag} does not work with ZeRO-3; use an empty CONFIG, which needs even less memory")
        return BitsAndBytesConfig(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_compute_dtype="bfloat16" if args.bf16 else "float32",
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
            llm_int8_skip_modules=list(NOT_QUANTISED),
        )


@dataclass
class RunArguments:
    """What both recipes add to transformers' `TrainingArguments`, before which this class stands as a base."""

    deepspeed: str | None = HfArg(default=None, aliases="--config_path", help="Settings, e.g. conf/ds_zero2.json.")
    lr_scheduler_type: str = HfArg(default="linear", help="Paper: linear decay to 0, no warm-up.")
    max_steps: int = HfArg(default=1000, help="Optimizer steps. Paper: 1000, the best was 500.")
    save_steps: float = HfArg(default=100, help="Steps between checkpoints. Paper: 100.")
    keep_optimizer: Literal["newest", "all", "none"] = HfArg(
        default="newest",
        help="Checkpoints that also hold what a run needs to resume (several times the weights' size).",
    )
    resume: bool = HfArg(default=False, help="Continue from the newest whole checkpoint of output_dir.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="Continue from this folder; true: as --resume.")
    force_resume: bool = HfArg(default=False, help="Resume although settings that change the result differ.")
    overwrite_output_dir: bool = HfArg(
        default=False, help="First remove checkpoints and results of another run, or of steps after the resumed one."
    )
    max_skipped: int = HfArg(default=5, help="End the run after this many steps in a row without a finite gradient.")
    logging_steps: float = HfArg(default=1, help="Steps between two lines of metrics.")
    bf16: bool | None = HfArg(default=None, help="bfloat16 mixed precision. Default: on without --use_cpu and --fp16.")
    questions_per_step: int = HfArg(default=16, help="Questions per optimizer step. Paper: 16.")
    gradient_accumulation_steps: int | None = HfArg(default=None, help="Default: what makes questions_per_step.")
    eval_file: str | None = HfArg(default=None, help="Questions, as MMAU's or AVQA's, to answer every eval_steps.")
    ddp_timeout: int = HfArg(default=1800, help="Seconds that a process waits for the others before the run ends.")
    ddp_find_unused_parameters: bool | None = HfArg(default=False, help="Off: every step uses all trained parameters.")
    use_wandb: bool = HfArg(default=False, help="Short for --report_to wandb.")

    def __post_init__(self):
        """Fill in what follows from other settings, before transformers' own checks."""
        for name, why in REFUSED.items():
            if value := getattr(self, name, None):
                raise ValueError(f"--{name} {value}: {why}; omit the flag")
        self.report_to = "wandb" if self.use_wandb else self.report_to
        self.save_only_model = self.save_only_model or self.keep_optimizer == "none"
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):
            self.resume = self.resume or str(self.resume_from_checkpoint).lower() == "true"
            self.resume_from_checkpoint = None
        if self.bf16 is None:
            self.bf16 = not (self.use_cpu or self.fp16)
        if self.gradient_accumulation_steps is None:
            questions = self.per_device_train_batch_size // getattr(self, "num_generations", 1)
            self.gradient_accumulation_steps = derive_accumulation(self.questions_per_step, questions)
        if self.eval_file is not None:
            if self.eval_strategy == "no":
                self.eval_strategy = "steps"
            self.eval_steps = self.eval_steps or self.save_steps
            self.metric_for_best_model = self.metric_for_best_model or "accuracy"
        elif self.eval_strategy != "no":
            raise ValueError(f"--eval_strategy {self.eval_strategy} requires --eval_file")
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
            # transformers would start the group, too, but on a CPU without the timeout.
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()


def check_optimizer(args: TrainingArguments) -> None:
    """Raise a `ValueError` or `ImportError` for an optimizer or schedule that transformers cannot make."""
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options | {"lr": 1.0})
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--optim or --lr_scheduler_type: {error}") from error


class Parser(TrlParser):
    """TRL's, which raises a `ValueError` instead of printing its usage in every process."""

    def error(self, message: str):
        raise ValueError(message)

    def set_defaults_with_config(self, **config) -> list[str]:
        """Check the values of a --config file like those of flags: TRL takes them as they are."""
        for action in self._actions:
            value = config.get(action.dest)
            if value is not None and (action.type not in (None, str) or action.nargs or action.choices):
                values = [
                    self._get_value(action, str(word)) for word in (value if isinstance(value, list) else [value])
                ]
                for found in values:
                    self._check_value(action, found)
                config[action.dest] = values if action.nargs == "+" else values[0]
        return super().set_defaults_with_config(**config)


def parse(parts: Sequence[type], check: Callable[..., None] | None = None, argv: Sequence[str] | None = None) -> tuple:
    """The dataclasses of a training script, filled from the command line and a `--config FILE.yaml`.

    `check` gets all of them, and raises a `ValueError` for flags that do not work together. Raises a `ValueError`, too,
    for a flag that does not exist or has an impossible value, and an `OSError` if the --config file cannot be read.
    """
    try:
        parsed = Parser(parts, allow_abbrev=False).parse_args_and_config(sys.argv[1:] if argv is None else list(argv))
    except yaml.YAMLError as error:
        raise ValueError(f"--config: not YAML ({' '.join(str(error).split())})") from error
    except (ValueError, ArgumentError) as error:
        raise ValueError(" ".join(str(error).split())) from error  # one line, of libraries too
    if check:
        check(*parsed)
    return parsed


def derive_accumulation(questions: int, per_pass: int) -> int:
    """Forward passes per optimizer step, so that `questions` questions make one step on any number of processes.

    `per_pass` counts the questions per process and pass. Raises a `ValueError` that names numbers which divide.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))  # asking torch would start its process group
    at_once = per_pass * processes
    if questions < 1 or per_pass < 1:
        raise ValueError("--questions_per_step and --per_device_train_batch_size must be at least one whole question")
    if questions % at_once == 0:
        return questions // at_once
    lower = questions // at_once * at_once
    working = [n for n in range(1, questions + 1) if questions % (n * per_pass) == 0]
    raise ValueError(
        f"--questions_per_step {questions} cannot be split evenly over {processes} processes with {per_pass} at once. "
        f"Use {f'{lower} or ' if lower else ''}{lower + at_once}"
        + (f", or {', '.join(map(str, working))} processes" if working else "")
        + (", or a smaller --per_device_train_batch_size" if per_pass > 1 else "")
    )
