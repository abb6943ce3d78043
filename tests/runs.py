"""Training runs in the tests' own process, with all attachments but the picture, which takes longer than their steps."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration, Trainer, TrainerCallback

from baselines.sft_trainer import AudioSFTTrainer
from dataset.dataset import load_train_dataset
from dataset.questions import load_questions
from run import attach
from run.checkpoints import checkpoints_in, result_settings
from run.curves import PlotCurves
from train import RecipeConfig
from train_sft import SFTRecipeConfig
from trainer.grpo_trainer import AudioGRPOTrainer

DEFAULTS = dict(
    use_cpu=True, questions_per_step=2, learning_rate=1e-2, max_steps=3, save_steps=1, seed=3, report_to="none",
    disable_tqdm=True,
)  # fmt: skip
GROUPS = dict(num_generations=2, max_completion_length=4)


def length_reward(completions, **kwargs) -> list[float]:
    """The share of letters before the middle of the alphabet: differs within most groups of an untrained model."""
    return [sum(letter < "n" for letter in text) / max(len(text), 1) for text in completions]


def make_run(kind: str, model: Path, data: Path, out: Path, reward: Callable = length_reward, **flags) -> Trainer:
    """A run of three steps of `grpo` or `sft` that saves after each, and evaluates if `eval_file` is given."""
    evaluated = load_questions(flags["eval_file"]) if "eval_file" in flags else None
    if kind == "grpo":
        args = RecipeConfig(str(out), **DEFAULTS | GROUPS | flags)
        trainer = AudioGRPOTrainer(
            str(model), [reward], args, load_train_dataset(data), eval_dataset=evaluated and evaluated.questions
        )
    else:
        args = SFTRecipeConfig(str(out), **DEFAULTS | dict(learning_rate=1e-3) | flags)
        loaded = Qwen2AudioForConditionalGeneration.from_pretrained(model)
        processor = AutoProcessor.from_pretrained(model)
        trainer = AudioSFTTrainer(
            loaded, args, load_train_dataset(data, "choice"), processor, eval_dataset=evaluated and evaluated.questions
        )
    attach(trainer, result_settings([args]) | {"engine": "none"}, evaluated)
    trainer.remove_callback(PlotCurves)
    return trainer


class InStep(TrainerCallback):
    """Calls a function at the beginning of a step."""

    def __init__(self, step: int, function: Callable[[], object]):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.function()


def log_of(folder: Path) -> list[dict]:
    """The entries of `log.jsonl`, which must be JSON without NaN."""

    def refuse(constant: str):
        raise AssertionError(f"log.jsonl holds {constant}")

    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def history_of(checkpoint: Path) -> list[dict]:
    """What a checkpoint's run logged, without times."""
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [{name: value for name, value in entry.items() if name != "step_time"} for entry in history]


def names(out: Path) -> list[str]:
    """Of a run's checkpoints, in the order of their steps."""
    return [path.name for path in checkpoints_in(out)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
