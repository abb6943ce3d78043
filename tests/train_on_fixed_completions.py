"""Two training steps whose completions are given, not sampled: the same work for every engine and number of processes.

    python tests/train_on_fixed_completions.py MODEL DATA OUTPUT CONFIG LOG [CHECKPOINT to resume from]

test_train.py and benchmarks/correctness.py run it.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from dataset.dataset import load_train_dataset
from evaluation.processes import leave
from run.checkpoints import forbid_pickles
from train import RecipeConfig
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.rollout import pad_completions

GENERATIONS = 4


class FixedCompletions(AudioGRPOTrainer):
    """Completions that depend on the question alone: its prompt's tokens in different orders and lengths."""

    def sample(self, questions):
        completions = []
        for ids in questions.input_ids.tolist():
            text = [token for token in ids if token > 10]
            for k in range(GENERATIONS):
                completions.append(text[k :: k + 3][: 2 + 2 * k] + [self.eos_token_ids[0]])
        device = self.accelerator.device
        return questions.to(device), *pad_completions(completions, GENERATIONS, self._tokenizer.pad_token_id, device)


def vowels(completions, **kwargs) -> list[float]:
    """A reward that differs within every group."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def main(model: str, data: str, output: str, config: str, log: str, start: str | None = None) -> None:
    on_gpu = "FIXED_COMPLETIONS_ON_GPU" in os.environ  # set by correctness.py; tests may have more processes than GPUs
    args = RecipeConfig(
        output, use_cpu=not on_gpu, bf16=False, deepspeed=config or None, max_steps=2, save_steps=1, keep_optimizer="all", questions_per_step=4,
        num_generations=GENERATIONS, learning_rate=1e-2, lr_scheduler_type="constant", beta=0.1, report_to="none",
        shuffle_dataset=False,
    )  # fmt: skip
    args.model_init_kwargs = {"dtype": "float32"}
    trainer = FixedCompletions(model, [vowels], args, load_train_dataset(data))
    if start and config:
        forbid_pickles()
    trainer.train(resume_from_checkpoint=start)
    if trainer.accelerator.is_main_process:
        steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        Path(log).write_text(json.dumps(steps))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
