"""Which values the flags of the training scripts may have: held here, before a model is loaded, against what would end
in a division by zero, a library's error after the first rollouts, or a run that learns nothing.
"""

import json
import math
from dataclasses import fields
from pathlib import Path

from transformers import SchedulerType
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dataset.rows import read_json

# What is expected, its test, and the flags it is for. None of them means "not given", which all may be.
NUMBERS = (
    ("1 or more", lambda value: value >= 1, (
        "questions_per_step", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "generation_batch_size", "steps_per_generation", "num_iterations",
        "num_generations_eval", "max_completion_length", "max_prompt_length", "max_resample_rounds", "save_total_limit",
        "max_skipped", "ref_model_sync_steps", "lora_r", "lora_alpha", "eval_accumulation_steps",
        "dataloader_prefetch_factor", "vllm_max_model_length",
    )),
    ("2 or more, since a completion is compared with the others of its question", lambda value: value >= 2,
        ("num_generations",)),
    ("-1 (as many as --num_train_epochs make), or 1 or more", lambda value: value == -1 or value >= 1, ("max_steps",)),
    ("more than 0", lambda value: value > 0, (
        "temperature", "repetition_penalty", "adam_epsilon", "num_train_epochs", "save_steps", "eval_steps",
        "logging_steps", "epsilon", "epsilon_high", "delta",
    )),
    ("0 or more", lambda value: value >= 0, (
        "learning_rate", "beta", "weight_decay", "max_grad_norm", "warmup_steps", "top_k", "seed", "data_seed",
        "dataloader_num_workers", "eval_delay",
    )),
    ("a share, from 0 to 1", lambda value: 0 <= value <= 1, (
        "max_dropped", "min_p", "warmup_ratio", "ref_model_mixup_alpha", "top_entropy_quantile",
    )),
    ("more than 0 and at most 1", lambda value: 0 < value <= 1, ("top_p", "vllm_gpu_memory_utilization")),
    ("from 0 on and below 1", lambda value: 0 <= value < 1, (
        "adam_beta1", "adam_beta2", "lora_dropout", "label_smoothing_factor",
    )),
)  # fmt: skip
WORDS = {  # a wrong one is found after the model is loaded, or after the first rollouts
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "lr_scheduler_type": tuple(kind.value for kind in SchedulerType),
    "report_to": ("none", "all", *INTEGRATION_TO_CALLBACK),
}
FILES = ("deepspeed", "accelerator_config", "fsdp_config")  # objects that may also be named by a file
NOT_OURS = "code that comes with a model is never executed, and weights are read from safetensors only"


def check_values(part) -> None:
    """Hold what one dataclass of a command line was filled with against the tables.

    Raises:
        ValueError: names the flag, its value, and what is expected.
    """
    for field in fields(part):
        values = getattr(part, field.name)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, float) and not math.isfinite(value):
                raise wrong(field.name, value, "a finite number")
    for expected, holds, flags in NUMBERS:
        for flag in flags:
            value = getattr(part, flag, None)
            if value is not None and not (isinstance(value, int | float) and holds(value)):
                raise wrong(flag, value, expected)
    for flag, words in WORDS.items():
        values = getattr(part, flag, None)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str) and value not in words:
                raise wrong(flag, value, f"one of {', '.join(words)}")
    for flag in getattr(part, "_VALID_DICT_FIELDS", ()):
        _check_object(flag, getattr(part, flag))
    if getattr(part, "trust_remote_code", False):
        raise ValueError(f"--trust_remote_code true: {NOT_OURS}")


def wrong(flag: str, value, expected: str) -> ValueError:
    """The error for a value that a flag does not take."""
    shown = f"{value:g}" if isinstance(value, float) else value
    return ValueError(f"--{flag} {shown}: expected {expected}")


def _check_object(flag: str, value) -> None:
    """A flag whose value is a JSON object, or a file with one."""
    if isinstance(value, str) and value:
        if value.startswith("{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"--{flag} {value:.80}: not JSON ({error})") from error
        elif flag not in FILES:
            raise wrong(flag, value, "a JSON object, as '{\"key\": 1}'")
        elif not Path(value).is_file():
            raise ValueError(f"--{flag} {value}: there is no such file")
        else:
            read_json(value, f"--{flag} takes a file with one JSON object")
    for key in ("trust_remote_code", "use_safetensors", "custom_generate"):
        if isinstance(value, dict) and key in value:
            raise ValueError(f"--{flag} sets {key}: {NOT_OURS}")
