"""Greedy accuracy on a question file during training, by the code with which `test_mmau.py` evaluates a checkpoint.

Every process answers its share. The scores are the official script's, in percent: `eval_accuracy`,
`eval_accuracy_sound`, ... `eval_left_out` counts the questions whose clip broke before: they are omitted from then on.
"""

import re
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from transformers import Trainer
from trl.models import unwrap_model_for_generation

from dataset.prompt import DEFAULT_STYLE
from dataset.questions import Benchmark
from dataset.rows import first_problems
from evaluation.answers import EncodedQuestions, answer_batches
from evaluation.clips import measure_clips
from evaluation.mmau import Scores, evaluate
from evaluation.results import MAX_NEW_TOKENS, Completion, Settings, to_records
from model.qwen2_audio import base_model


def to_metrics(scores: Scores) -> dict[str, float]:
    """Accuracies in percent: `accuracy`, `accuracy_TASK`."""
    tasks = next(iter(scores.groups.values())).items()
    by_task = {"accuracy_" + re.sub(r"\W+", "_", task): 100 * right / asked for task, (right, asked) in tasks if asked}
    return {"accuracy": scores.accuracy} | by_task


class GreedyAccuracy:
    """Takes the place of `Trainer.evaluate`: answers these questions at every evaluation."""

    def __init__(self, trainer: Trainer, questions: Benchmark):
        self.trainer, self.benchmark, self.left_out = trainer, questions, 0

    def __call__(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        trainer, questions = self.trainer, self._encode()
        asked = replace(self.benchmark, questions=questions.questions)
        completions = gather_object(list(self._answer(questions).items()))
        scores = evaluate(to_records(asked, dict(completions)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in to_metrics(scores).items()}
        if self.left_out:
            metrics[f"{metric_key_prefix}_left_out"] = self.left_out
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    def _encode(self) -> EncodedQuestions:
        """The questions as the model's inputs. Unusable ones are reported, and omitted for the rest of the run."""
        trainer = self.trainer
        settings = Settings(
            style=trainer.prompt_style or DEFAULT_STYLE,
            channels=trainer.audio_channels,
            max_new_tokens=getattr(trainer, "max_completion_length", MAX_NEW_TOKENS),
            batch_size=trainer.args.per_device_eval_batch_size,
        )
        samples = measure_clips(self.benchmark.questions, settings.channels)
        questions = EncodedQuestions(self.benchmark.questions, samples, trainer.processing_class, settings)
        if problems := questions.find_unusable():
            self.left_out += len(problems)
            questions = questions.without(problems)
            self.benchmark = replace(self.benchmark, questions=questions.questions)
            count = f"--eval_file: {len(problems)} questions are omitted from now on"
            trainer.accelerator.print(f"{count}:\n  {first_problems(problems.values())}")
        return questions

    def _answer(self, questions: EncodedQuestions) -> dict[str, Completion]:
        """This process's share of the answers."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        completions: dict[str, Completion] = {}
        if not questions.questions:
            return completions
        was_training, title = trainer.model.training, None if trainer.args.disable_tqdm else "evaluation"
        unwrapped = unwrap_model_for_generation(trainer.model_wrapped, accelerator)
        with unwrapped as model, torch.no_grad(), accelerator.autocast():
            try:
                batches = questions.batches()
                answer_batches(base_model(model.eval()), questions, batches, completions.update, title)
            finally:
                trainer.model.train(was_training)
        return completions
