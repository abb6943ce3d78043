"""Train with GRPO: arguments -> data set -> trainer -> save. `sh run_grpo.sh` starts it; `--help` lists every flag.

The defaults are the recipe of R1-AQA (arXiv 2503.11197) as its code ran. Machine and paths are the launcher's, the
engine's settings are those of `conf/`.
"""

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from datasets import Dataset
from transformers import ProcessorMixin
from transformers.hf_argparser import HfArg
from trl import GRPOConfig

from arguments import AudioModelConfig, DataArguments, RecipeParser, RunArguments
from dataset.questions import Benchmark
from evaluation.sweep import together
from limits import check_values
from startup import run_training
from trainer.checked_rewards import CheckedReward, RewardError, checked, describe_error, try_rewards
from trainer.grpo_trainer import AudioGRPOTrainer, check_rollout_engine, check_whole_groups
from trainer.reference import check_ref_offload
from utils.rewards import accuracy_reward, format_reward

REWARD_FUNCS: dict[str, Callable[..., list[float]]] = {"accuracy": accuracy_reward, "format": format_reward}


@dataclass
class RewardArguments:
    """What to reward."""

    reward_funcs: list[str] = HfArg(
        default_factory=lambda: list(REWARD_FUNCS), help="Summed: accuracy, format, or yours as file.py:name."
    )
    resample_uniform_groups: bool = HfArg(default=False, help="Replace questions whose rewards all agree. Paper: no.")
    max_resample_rounds: int = HfArg(default=4, help="Further rounds of rollouts for that, per generation batch.")

    def __post_init__(self):
        check_values(self)


@dataclass
class RecipeConfig(RunArguments, GRPOConfig):
    """TRL's `GRPOConfig` with the paper's recipe as defaults, and the accumulation derived from the world size."""

    output_dir: str = HfArg(default="exp/model", aliases="--out_dir", help="Checkpoints go here.")
    per_device_train_batch_size: int | None = HfArg(default=None, help="Completions, whole groups. Default: one.")
    num_generations: int = HfArg(default=8, help="Completions per question, G. Paper: 8.")
    learning_rate: float = HfArg(default=1e-6, help="Peak, of AdamW. Paper: 1e-6.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradient clipping. Paper: 1.0.")
    beta: float = HfArg(default=0.04, help="KL coefficient. Paper: 0.04; 0.001 was reported as better.")
    loss_type: str = HfArg(default="grpo", help="As TRL names them. Paper: grpo.")
    ref_offload: bool = HfArg(default=False, help="The reference waits on the CPU between its passes. Paper: no.")
    use_bias_correction_kl: bool = HfArg(default=False, help="KL weighted by the importance ratio. Paper: no.")
    temperature: float = HfArg(default=1.0, help="Of sampling. Paper: 1.0.")
    top_k: int = HfArg(default=50, help="Of sampling; 0 is off. Paper: 50, its library's default.")
    max_completion_length: int | None = HfArg(default=256, help="New tokens at most. Paper: 256.")
    num_completions_to_print: int | None = HfArg(default=0, help="Of --log_completions; its files hold all of them.")
    gradient_checkpointing: bool | None = HfArg(default=None, help="Now activation_checkpointing. Paper: off.")

    def __post_init__(self):
        check_values(self)  # before it is divided by them
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = self.num_generations
        check_whole_groups("per_device_train_batch_size", self.per_device_train_batch_size, self.num_generations)
        super().__post_init__()


def build_trainer(
    dataset: Dataset,
    processor: ProcessorMixin,
    eval_questions: Benchmark | None,
    data: DataArguments,
    rewards: RewardArguments,
    args: RecipeConfig,
    model: AudioModelConfig,
) -> AudioGRPOTrainer:
    """The trainer, its model loaded; the data set has been examined. A `RewardError` comes before the model."""
    reward_funcs = load_rewards(rewards.reward_funcs, dataset, processor)
    args.model_init_kwargs = model.init_kwargs(args) | (args.model_init_kwargs or {})
    trainer = AudioGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        audio_channels=data.audio_channels,
        freeze=data.freeze,
        eval_questions=eval_questions,
        ref_offload=args.ref_offload,
        max_resample_rounds=rewards.max_resample_rounds if rewards.resample_uniform_groups else 0,
        peft_config=model.adapters(),
        quantization_config=model.quantisation(args),
    )
    trainer.accelerator.print(
        f"{len(dataset)} questions, style {data.prompt_style}; a step is {args.gradient_accumulation_steps} x "
        f"{args.per_device_train_batch_size} completions on {args.world_size} process(es)"
    )
    return trainer


def load_rewards(names: Sequence[str], dataset: Dataset, processor: ProcessorMixin) -> list[CheckedReward]:
    """The rewards by their names, each called once by the first process on two made-up completions (`try_rewards`).

    Raises:
        RewardError: one is not there, or cannot be used.
    """
    rewards = [checked(load_reward(name)) for name in names]
    together(lambda: try_rewards(rewards, dataset, processor.tokenizer), main=True)
    return rewards


def load_reward(name: str) -> Callable:
    """A reward by its name: `accuracy`, `format`, or `path/to/file.py:function` for one's own.

    The function gets the arguments that it names, of `completions`, `prompts`, `completion_ids` and every column of the
    data set (`solution`, `style`, `audio_path`, ...), and returns a list with one number for each completion (None: not
    applicable). It may be a coroutine function. Before the model is loaded it is called once on two made-up
    completions, in the first process: one that keeps state, or costs money, must not mind.

    Raises:
        RewardError: no such reward, file or function, or the file cannot be run.
    """
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise RewardError(f"unknown reward {name!r}: it is one of {', '.join(REWARD_FUNCS)}, or file.py:function")
    if not Path(path).is_file():
        raise RewardError(f"reward {name}: there is no file {path}")
    try:
        reward = runpy.run_path(path).get(function)
    except Exception as error:
        raise RewardError(f"reward {name}: {describe_error(error, path)}, when its file was run") from error
    if not callable(reward):
        raise RewardError(f"reward {name}: {path} has no function {function!r}")
    return reward


def check_weights(weights: Sequence[float], names: Sequence[str]) -> None:
    """Raise a `RewardError` if there is not one finite weight for each of the rewards of these names."""
    if len(weights) != len(names) or not all(map(isfinite, weights)):
        raise RewardError(
            f"--reward_weights {' '.join(map(str, weights))}: one finite number for each of {', '.join(names)} is "
            f"needed; there are {len(weights)} weights for the {len(names)} rewards {' '.join(names)}"
        )


def check_together(data: DataArguments, rewards: RewardArguments, args: RecipeConfig, model: AudioModelConfig) -> None:
    """Raise a `ValueError` for flags that do not go together, which TRL would find when the model is loaded."""
    if args.reward_weights is not None:
        check_weights(args.reward_weights, rewards.reward_funcs)
    if args.sync_ref_model and args.beta == 0:
        raise ValueError("--sync_ref_model true with --beta 0: without a KL term there is no reference model to update")
    if args.sync_ref_model and model.use_peft:
        raise ValueError("--sync_ref_model true with --use_peft true: the reference is the model with its adapters off")
    if args.ref_offload:
        check_ref_offload(args, model.use_peft)
    check_rollout_engine(args, quantised=model.load_in_4bit or model.load_in_8bit)
    longest = data.max_prompt_length + (args.max_completion_length or 0)
    if args.use_vllm and (args.vllm_max_model_length or longest) < longest:
        flags = f"--max_prompt_length {data.max_prompt_length} and --max_completion_length {args.max_completion_length}"
        raise ValueError(f"--vllm_max_model_length {args.vllm_max_model_length}: {flags} take {longest}")


def make_parser() -> RecipeParser:
    """Every flag: ours, `GRPOConfig`'s and `ModelConfig`'s; `--config FILE.yaml` reads them from a file."""
    return RecipeParser((DataArguments, RewardArguments, RecipeConfig, AudioModelConfig), check_together)


if __name__ == "__main__":
    run_training(make_parser(), build_trainer)
