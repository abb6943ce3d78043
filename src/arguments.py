"""What the training scripts share of their command lines: data, model, schedule, and the passes that make a step."""

import json
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import yaml
from peft import PeftConfig
from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.hf_argparser import HfArg
from trl import ModelConfig, TrlParser, get_peft_config

from command_line import ExactFlags
from dataset.audio import CHANNELS
from dataset.encode import MAX_PROMPT_LENGTH
from dataset.prompt import DEFAULT_STYLE, STYLES
from limits import check_values, wrong
from model.qwen2_audio import HEAD, NOT_QUANTISED, PARTS
from trainer.finite import MAX_SKIPPED
from trainer.shared_prompt import ATTENTION

# Flags that change what a run learns, as far as a recipe has them: recorded in checkpoints, and compared by a run that
# goes on from one. How the work is spread (processes, accumulation), logged, evaluated and saved is not among them.
RESULT_FLAGS = (
    "prompt_style", "max_prompt_length", "audio_channels", "freeze",
    "reward_funcs", "reward_weights", "resample_uniform_groups", "max_resample_rounds",
    "questions_per_step", "generation_batch_size", "max_steps", "num_train_epochs", "seed", "data_seed",
    "shuffle_dataset", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
    "num_generations", "num_iterations", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "max_completion_length", "generation_kwargs", "mask_truncated_completions",
    "beta", "loss_type", "scale_rewards", "epsilon", "epsilon_high", "delta", "use_bias_correction_kl",
    "importance_sampling_level", "top_entropy_quantile", "entropy_coef",
    "use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    "dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "load_in_8bit",
)  # fmt: skip


def result_settings(parsed: Sequence) -> dict:
    """`RESULT_FLAGS` and their values in what a script's command line was parsed to, as JSON has them."""
    found = {flag: getattr(part, flag) for flag in RESULT_FLAGS for part in parsed if hasattr(part, flag)}
    return json.loads(json.dumps(found, default=str))


@dataclass
class DataArguments:
    """What to train on."""

    data_file: str = HfArg(default="data/AVQA/train_qa.data", help="JSONL of questions, as data/README.md shows.")
    prompt_style: str = HfArg(
        default=DEFAULT_STYLE, help="The paper's Prompt <1>, <2> or <3>.", metadata={"choices": list(STYLES)}
    )
    max_prompt_length: int = HfArg(
        default=MAX_PROMPT_LENGTH, help="Tokens, 25 a second of audio. Longer are dropped. Paper: 512, by cutting."
    )
    audio_channels: str = HfArg(default="first", help="To hear. Paper: first.", metadata={"choices": list(CHANNELS)})
    max_dropped: float = HfArg(default=0.1, help="Share of the rows that may be unusable; more stop the run.")
    freeze: list[str] = HfArg(default_factory=list, help="Not trained. Paper: none.", metadata={"choices": list(PARTS)})

    def __post_init__(self):
        check_values(self)
        if set(PARTS) <= set(self.freeze):
            raise ValueError(f"--freeze {' '.join(self.freeze)}: nothing is left to train")


@dataclass
class AudioModelConfig(ModelConfig):
    """TRL's `ModelConfig` with the paper's model, and adapters on the layers that both its halves have."""

    model_name_or_path: str = HfArg(default="Qwen/Qwen2-Audio-7B-Instruct", help="Hub name or folder of a Qwen2-Audio.")
    dtype: str | None = HfArg(
        default=None,
        help="Of the weights. Default: bfloat16 under DeepSpeed with bf16, which keeps float32 ones too; else float32.",
        metadata={"choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    lora_dropout: float = HfArg(
        default=0.0,
        help="Of adapters. Above 0 the policy differs from what it sampled with: a biased ratio.",
    )
    lora_target_modules: list[str] | None = HfArg(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        help="Layers that get adapters with --use_peft true. Not published by the paper.",
    )

    def __post_init__(self):
        check_values(self)
        if self.attn_implementation not in (None, *ATTENTION):
            words = f"one of {', '.join(ATTENTION)}, which take the mask of a shared prompt"
            raise wrong("attn_implementation", self.attn_implementation, words)
        if HEAD in (self.lora_target_modules or ()):
            raise ValueError(f"--lora_target_modules {HEAD}: its weights make the log-probs without adapters")
        super().__post_init__()

    def adapters(self) -> PeftConfig | None:
        """The adapters to train, which record their base's revision on the hub; None without --use_peft."""
        config = get_peft_config(self)
        if config and self.model_revision != "main" and not os.path.isdir(self.model_name_or_path):
            config.revision = self.model_revision
        return config

    def init_kwargs(self, args: TrainingArguments) -> dict:
        """Keyword arguments for `from_pretrained`, given the run's precision and engine."""
        frozen = self.load_in_4bit or self.load_in_8bit  # all but the adapters, which are float32
        dtype = self.dtype or ("bfloat16" if args.bf16 and (args.deepspeed or frozen) else "float32")
        return {
            "revision": self.model_revision,
            "attn_implementation": self.attn_implementation,
            "dtype": dtype,
            "use_safetensors": True,
        }

    def quantisation(self, args: TrainingArguments) -> BitsAndBytesConfig | None:
        """How the base model's layers are stored in 4 or 8 bits, for `from_pretrained`; None: they are not."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        return BitsAndBytesConfig(
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            bnb_4bit_compute_dtype="bfloat16" if args.bf16 else "float32",
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
            llm_int8_skip_modules=list(NOT_QUANTISED),
        )


def check_quantised(args: TrainingArguments, model: AudioModelConfig) -> None:
    """Raise a `ValueError` for a model of 4 or 8 bits that cannot be trained so."""
    if not (model.load_in_4bit or model.load_in_8bit):
        return
    flag = f"--load_in_{4 if model.load_in_4bit else 8}bit true"
    if not model.use_peft:
        raise ValueError(f"{flag} stores the weights in too few bits to train them; add --use_peft true (LoRA)")
    if args.deepspeed and args.hf_deepspeed_config.is_zero3():
        raise ValueError(f"{flag} does not work with ZeRO-3; start with an empty CONFIG, which needs less memory still")


@dataclass
class RunArguments:
    """What both recipes have in common beside transformers' `TrainingArguments`, before which it stands as a base."""

    deepspeed: str | None = HfArg(default=None, aliases="--config_path", help="Settings, e.g. conf/ds_zero2.json.")
    lr_scheduler_type: str = HfArg(default="linear", help="Paper: linear decay to 0, no warm-up.")
    max_steps: int = HfArg(default=1000, help="Optimizer steps. Paper: 1000, the best was 500.")
    save_steps: float = HfArg(default=100, help="Steps between checkpoints. Paper: 100.")
    keep_optimizer: str = HfArg(
        default="newest",
        help="Which checkpoints hold, beside the weights, what a run needs to go on (several times their size).",
        metadata={"choices": ["newest", "all", "none"]},
    )
    resume: bool = HfArg(
        default=False, help="Go on from the newest whole checkpoint of output_dir, as if the run had not been cut off."
    )
    resume_from_checkpoint: str | None = HfArg(default=None, help="Go on from this folder; true: as --resume.")
    force_resume: bool = HfArg(default=False, help="Go on although settings differ that change the result.")
    overwrite_output_dir: bool = HfArg(
        default=False,
        help="Of another run in output_dir, remove the checkpoints and their results (checkpoint-*, test_STEP) first; "
        "with --resume_from_checkpoint, those of later steps.",
    )
    max_skipped: int = HfArg(
        default=MAX_SKIPPED,
        help="Steps in a row whose loss or gradient is not finite, and which are skipped, that end the run.",
    )
    logging_steps: float = HfArg(default=1, help="Steps between two lines of metrics.")
    bf16: bool | None = HfArg(default=None, help="Mixed precision. Default: unless --use_cpu or --fp16.")
    questions_per_step: int = HfArg(default=16, help="Questions per optimizer step. Paper: 16.")
    gradient_accumulation_steps: int | None = HfArg(default=None, help="Default: what makes questions_per_step.")
    eval_file: str | None = HfArg(
        default=None, help="Questions in MMAU's or AVQA's format, asked every eval_steps; default: save_steps."
    )
    probe_memory: bool | None = HfArg(
        default=None,
        help="Before step 1, try the largest micro-batch that the data can give, and throw it away. Default: on a GPU.",
    )
    dataloader_num_workers: int = HfArg(
        default=0, help="Processes that decode and encode the next clips while a step computes; 0: the step waits."
    )
    ddp_timeout: int = HfArg(
        default=1800, help="Seconds that a process waits for the others, before it takes one for dead and ends the run."
    )
    ddp_find_unused_parameters: bool | None = HfArg(default=False, help="Off: each takes part in every step.")
    verbose: bool = HfArg(default=False, help="Show what libraries say of themselves, too: bars, deprecations.")
    use_wandb: bool = HfArg(default=False, help="Short for --report_to wandb.")
    trust_remote_code: bool = HfArg(default=False, help="Refused: code that comes with a model is never executed.")

    def __post_init__(self):
        """Fill in what follows from other settings, before transformers' own checks."""
        check_values(self)
        if self.use_wandb:
            self.report_to = "wandb"
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
        several = torch.distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
        if self.use_cpu and several and not torch.distributed.is_initialized():
            # transformers would start the group, too, but on a CPU without the timeout.
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()


class RecipeParser(ExactFlags, TrlParser):
    """The parser of a training script: TRL's, with exact flags, of which `--config FILE.yaml` names some, too."""

    def __init__(self, parts: Sequence[type], check: Callable[..., None] | None = None):
        """
        Args:
            parts: the dataclasses that the flags fill.
            check: called with all of them, filled; raises a `ValueError` for what does not go together.
        """
        super().__init__(parts)
        self.check = check

    def parse_args_and_config(self, args: Sequence[str] | None = None) -> tuple:
        """The dataclasses, filled. What argparse itself refuses ends in `error`.

        Raises:
            ValueError: a value that cannot be, or flags that do not go together.
            OSError: the --config file cannot be read.
        """
        words = []
        for word in sys.argv[1:] if args is None else args:
            words += word.split("=", 1) if word.startswith("--config=") else [word]
        if words[-1:] == ["--config"]:
            self.error("--config: a YAML file is expected")
        try:
            parsed = super().parse_args_and_config(words)
        except yaml.YAMLError as error:
            raise ValueError(f"--config: not YAML ({' '.join(str(error).split())})") from error
        except ValueError as error:
            raise ValueError(" ".join(str(error).split())) from error  # one sentence, of libraries too
        if self.check:
            self.check(*parsed)
        return parsed

    def set_defaults_with_config(self, **config) -> list[str]:
        """Take the values of a --config file as the flags would: TRL takes them as they are."""
        for action in self._actions:
            value = config.get(action.dest)
            if value is None or action.type in (None, str) and not (action.nargs or action.choices):
                continue
            values = value if isinstance(value, list) else [value]
            try:
                values = [self._get_value(action, str(word)) for word in values]
                for found in values:
                    self._check_value(action, found)
            except ArgumentError as error:
                self.error(str(error))
            config[action.dest] = values if action.nargs == "+" else values[0]
        if unknown := super().set_defaults_with_config(**config):
            self.refuse(unknown)
        return []


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
    lower = questions // at_once * at_once
    working = [n for n in range(1, questions + 1) if questions % (n * per_pass) == 0]
    raise ValueError(
        f"{questions} questions per step cannot be split evenly over {processes} processes with {per_pass} at once. "
        f"What works: --questions_per_step {f'{lower} or ' if lower else ''}{lower + at_once}"
        + (f", or {', '.join(map(str, working))} processes" if working else "")
        + (", or a smaller --per_device_train_batch_size" if per_pass > 1 else "")
    )
