"""Train with GRPO: arguments -> data set -> trainer -> save. `sh run_grpo.sh` starts it; `--help` lists every flag.

The defaults are the recipe of R1-AQA (arXiv 2503.11197) as its code ran. Machine and paths are the launcher's, the
engine's settings are those of `conf/`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import ProcessorMixin
from trl import GRPOConfig, TrlParser, get_peft_config, get_quantization_config

from arguments import AudioModelConfig, DataArguments, RunArguments
from dataset.questions import load_questions
from startup import run_training
from trainer.grpo_trainer import AudioGRPOTrainer, check_whole_groups
from utils.rewards import accuracy_reward, format_reward

REWARD_FUNCS = {"accuracy": accuracy_reward, "format": format_reward}


@dataclass
class RewardArguments:
    """What to reward."""

    reward_funcs: list[str] = field(
        default_factory=lambda: list(REWARD_FUNCS),
        metadata={"help": "Rewards, summed: accuracy, format, or a function of yours as file.py:name."},
    )
    resample_uniform_groups: bool = field(
        default=False,
        metadata={"help": "Replace questions whose completions all got the same reward by fresh ones. Paper: no."},
    )
    max_resample_rounds: int = field(
        default=4, metadata={"help": "Rounds of rollouts for that, per generation batch, beyond the first."}
    )


@dataclass
class RecipeConfig(RunArguments, GRPOConfig):
    """TRL's `GRPOConfig` with the paper's recipe as defaults, and the accumulation derived from the world size."""

    output_dir: str = field(default="exp/model", metadata={"help": "Checkpoints go here.", "aliases": ["--out_dir"]})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Completions per forward pass, whole groups. Default: num_generations, one question."},
    )
    num_generations: int | None = field(default=8, metadata={"help": "Completions per question, G. Paper: 8."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak, of AdamW. Paper: 1e-6."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Paper: linear decay to 0, no warm-up."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping. Paper: 1.0."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps. Paper: 1000, the best was 500."})
    save_steps: float = field(default=100, metadata={"help": "Steps between checkpoints. Paper: 100."})
    save_only_model: bool = field(
        default=True, metadata={"help": "Checkpoints without optimizer state: smaller, but no resuming. Paper: true."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of metrics."})
    beta: float = field(default=0.04, metadata={"help": "KL coefficient. Paper: 0.04; 0.001 was reported as better."})
    loss_type: str = field(default="grpo", metadata={"help": "As TRL names them. Paper: grpo."})
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Weight the KL by the importance ratio (TRL's default). Paper: no."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of sampling. Paper: 1.0."})
    top_k: int = field(default=50, metadata={"help": "Of sampling; 0 is off. Paper: 50, its library's default."})
    max_completion_length: int | None = field(default=256, metadata={"help": "New tokens at most. Paper: 256."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of activation_checkpointing. Paper: off."}
    )

    def __post_init__(self):
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = self.num_generations
        check_whole_groups("per_device_train_batch_size", self.per_device_train_batch_size, self.num_generations)
        self.settle(self.per_device_train_batch_size // self.num_generations)
        super().__post_init__()


def build_trainer(
    dataset: Dataset,
    processor: ProcessorMixin,
    data: DataArguments,
    rewards: RewardArguments,
    args: RecipeConfig,
    model: AudioModelConfig,
) -> AudioGRPOTrainer:
    """The trainer, its model loaded; the data set has been examined."""
    args.model_init_kwargs = model.init_kwargs(args.bf16, args.deepspeed) | (args.model_init_kwargs or {})
    trainer = AudioGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=[load_reward(name) for name in rewards.reward_funcs],
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        audio_channels=data.audio_channels,
        freeze=data.freeze,
        eval_questions=load_questions(args.eval_file) if args.eval_file else None,
        max_resample_rounds=rewards.max_resample_rounds if rewards.resample_uniform_groups else 0,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.accelerator.print(
        f"{len(trainer.train_dataset)} questions, style {data.prompt_style}; a step is "
        f"{args.gradient_accumulation_steps} x {args.per_device_train_batch_size} completions on "
        f"{args.world_size} process(es)"
    )
    return trainer


def load_reward(name: str) -> Callable[..., list[float]]:
    """A reward by its name: `accuracy`, `format`, or `path/to/file.py:function` for one's own.

    The function gets `completions`, `prompts`, `completion_ids` and every column of the data set (`solution`, `style`,
    `audio_path`, ...) as keyword arguments, and returns one float for each completion (None: not applicable).

    Raises:
        ValueError: no such reward, file or function. What the file itself raises comes through as it is.
    """
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"unknown reward {name!r}: it is one of {', '.join(REWARD_FUNCS)}, or file.py:function")
    if not Path(path).is_file():
        raise ValueError(f"reward {name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward {name}: {path} has no function {function!r}")
    return getattr(module, function)


def make_parser() -> TrlParser:
    """Every flag: ours, `GRPOConfig`'s and `ModelConfig`'s; `--config FILE.yaml` reads them from a file."""
    return TrlParser((DataArguments, RewardArguments, RecipeConfig, AudioModelConfig))


if __name__ == "__main__":
    run_training(make_parser(), build_trainer)
