"""Train with GRPO: arguments -> data set -> trainer -> save. `sh run_grpo.sh` starts it; `--help` lists every flag.

The defaults are the recipe of R1-AQA (arXiv 2503.11197) as its code ran. Machine and paths are the launcher's, the
engine's settings are those of `conf/`.
"""

from dataclasses import dataclass
from functools import partial

from transformers.hf_argparser import HfArg
from trl import GRPOConfig

from run import attach
from run.arguments import AudioModelConfig, DataArguments, RunArguments, parse
from run.rewards import RewardArguments, check_weights, load_rewards, reward_files
from run.startup import Prepared, run
from trainer.grpo_trainer import AudioGRPOTrainer, check_settings
from trainer.rollout import check_whole_groups


@dataclass
class RecipeConfig(RunArguments, GRPOConfig):
    """TRL's `GRPOConfig` with the paper's recipe as defaults, and the accumulation derived from the world size."""

    output_dir: str = HfArg(default="exp/model", aliases="--out_dir", help="Checkpoints go here.")
    per_device_train_batch_size: int | None = HfArg(default=None, help="Completions per pass. Default: one group.")
    num_generations: int = HfArg(default=8, help="Completions per question, G. Paper: 8.")
    learning_rate: float = HfArg(default=1e-6, help="Peak, of AdamW. Paper: 1e-6.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradient clipping. Paper: 1.0.")
    beta: float = HfArg(default=0.04, help="KL coefficient. Paper: 0.04; 0.001 was reported as better.")
    loss_type: str = HfArg(default="grpo", help="One of src/trainer/loss.py. Paper: grpo.")
    use_bias_correction_kl: bool = HfArg(default=False, help="KL weighted by the importance ratio. Paper: no.")
    temperature: float = HfArg(default=1.0, help="Of sampling. Paper: 1.0.")
    top_k: int = HfArg(default=50, help="Of sampling; 0 is off. Paper: 50, its library's default.")
    max_completion_length: int | None = HfArg(default=256, help="New tokens at most. Paper: 256.")
    num_completions_to_print: int | None = HfArg(default=0, help="Printed by --log_completions; its files hold all.")
    gradient_checkpointing: bool | None = HfArg(default=None, help="Deprecated: use --activation_checkpointing.")

    def __post_init__(self):
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = self.num_generations
        check_whole_groups("per_device_train_batch_size", self.per_device_train_batch_size, self.num_generations)
        if self.eval_file:  # greedy answers have no groups
            self.num_generations_eval = self.num_generations_eval or 1
        if self.sync_ref_model:  # the reference is not saved
            self.keep_optimizer = "none"
        super().__post_init__()


def check(data: DataArguments, rewards: RewardArguments, args: RecipeConfig, model: AudioModelConfig) -> None:
    """Raise a `ValueError` for flags that do not work together, which TRL would find once the model is loaded."""
    if args.reward_weights is not None:
        check_weights(args.reward_weights, rewards.reward_funcs)
    if args.sync_ref_model and (args.beta == 0 or model.use_peft):
        raise ValueError("--sync_ref_model true needs a reference model: --beta above 0, and no --use_peft")
    if args.use_vllm:
        from run.vllm import check_vllm

        check_vllm(args, data.max_prompt_length, quantised=model.load_in_4bit or model.load_in_8bit)
    else:
        check_settings(args)


def build(
    run: Prepared, data: DataArguments, rewards: RewardArguments, args: RecipeConfig, model: AudioModelConfig
) -> AudioGRPOTrainer:
    """The trainer, its model loaded, with all attachments."""
    reward_funcs = load_rewards(rewards.reward_funcs, run.dataset, run.processor.tokenizer)
    args.model_init_kwargs = model.init_kwargs(args) | (args.model_init_kwargs or {})
    use_vllm, args.use_vllm = args.use_vllm, False  # TRL's own takes no audio
    trainer = AudioGRPOTrainer(
        run.model, reward_funcs, args, run.dataset, run.processor, data.audio_channels, data.freeze,
        eval_dataset=run.eval_questions and run.eval_questions.questions,
        peft_config=model.adapters(), quantization_config=model.quantisation(args),
    )  # fmt: skip
    args.use_vllm = use_vllm
    rounds = rewards.max_resample_rounds if rewards.resample_uniform_groups else 0
    attach(trainer, run.settings, run.eval_questions, rounds)
    trainer.accelerator.print(
        f"{len(run.dataset)} questions, style {data.prompt_style}; a step is {args.gradient_accumulation_steps} x "
        f"{args.per_device_train_batch_size} completions on {args.world_size} process(es)"
    )
    return trainer


if __name__ == "__main__":
    parts = DataArguments, RewardArguments, RecipeConfig, AudioModelConfig
    run(partial(parse, parts, check), build, lambda data, rewards, *_: reward_files(rewards.reward_funcs))
