"""Two training steps whose completions are given, not sampled, so that every engine and number of processes has the
same work: python train_on_fixed_completions.py MODEL DATA OUTPUT CONFIG LOG [CHECKPOINT to go on from]. Not a test itself: test_train.py runs it."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from dataset.dataset import load_train_dataset
from evaluation.sweep import leave
from train import RecipeConfig
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.resume import execute_nothing

GENERATIONS = 4


class FixedCompletions(AudioGRPOTrainer):
    """Completions that depend on the question alone: its prompt's tokens in different orders and lengths."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        completions = []
        for i, ids in enumerate(prompt_ids):
            k = i % num_generations
            text = [token for token in ids if token > 10]
            completions.append(text[k :: k + 3][: 2 + 2 * k] + [self.eos_token_ids[0]])
        return completions, None


def vowels(completions, **kwargs) -> list[float]:
    """A reward that differs within every group."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def main(model: str, data: str, output: str, config: str, log: str, start: str | None = None) -> None:
    on_gpu = (
        "FIXED_COMPLETIONS_ON_GPU" in os.environ
    )  # of `benchmarks/correctness.py`; tests may have more processes than GPUs
    args = RecipeConfig(
        output, use_cpu=not on_gpu, bf16=False, deepspeed=config or None, max_steps=2, save_steps=1, keep_optimizer="all", questions_per_step=4,
        num_generations=GENERATIONS, learning_rate=1e-2, lr_scheduler_type="constant", beta=0.1, report_to="none",
        shuffle_dataset=False,
    )  # fmt: skip
    args.model_init_kwargs = {"dtype": "float32"}
    # Where a reference can wait on the CPU, it does: of one that stays the steps are the same.
    trainer = FixedCompletions(model, [vowels], args, load_train_dataset(data), ref_offload="zero2" in config)
    execute_nothing(bool(config))
    trainer.train(resume_from_checkpoint=start)
    if trainer.accelerator.is_main_process:
        steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        Path(log).write_text(json.dumps(steps))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
