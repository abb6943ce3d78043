"""Greedy accuracy on a question file during training, by the evaluation that `test_mmau.py` uses on a checkpoint.

Mixin for the trainers. Every process answers its share; the scores are those of the official script, per task and in
total, in percent, and go where all metrics go: `eval_accuracy`, `eval_accuracy_sound`, ...
"""

import re

import torch
from accelerate.utils import gather_object
from trl.models import unwrap_model_for_generation

from dataset.prompt import DEFAULT_STYLE
from dataset.questions import Benchmark
from dataset.rows import first_problems
from evaluation.answers import EncodedQuestions, answer_batches, load_clips
from evaluation.mmau import Scores, evaluate
from evaluation.results import MAX_NEW_TOKENS, Run, to_records
from model.qwen2_audio import base_model


class GreedyAccuracy:
    """To stand before the trainer class, to whose arguments it adds `eval_questions`."""

    max_completion_length: int = MAX_NEW_TOKENS  # GRPO's is its setting

    def __init__(self, *args, eval_questions: Benchmark | None = None, **kwargs):
        if eval_questions:
            kwargs["eval_dataset"] = eval_questions.questions  # `Trainer` wants one; `evaluate` looks at them alone
        super().__init__(*args, **kwargs)
        self.eval_questions = eval_questions

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Ask `eval_questions`; without any, or with a data set given, what the trainer itself does."""
        if self.eval_questions is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        scores = self._score_eval_questions()
        metrics = {f"{metric_key_prefix}_accuracy": scores.accuracy}
        for task, (right, questions) in next(iter(scores.groups.values())).items():
            if questions:
                name = re.sub(r"\W+", "_", task)
                metrics[f"{metric_key_prefix}_accuracy_{name}"] = 100 * right / questions
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score_eval_questions(self) -> Scores:
        args, benchmark = self.args, self.eval_questions
        run = Run(
            style=self.prompt_style or DEFAULT_STYLE,
            channels=self.audio_channels,
            max_new_tokens=self.max_completion_length,
            batch_size=args.per_device_eval_batch_size,
        )
        clips = load_clips(benchmark.questions, run.channels, args.dataloader_num_workers)
        questions = EncodedQuestions(benchmark.questions, clips, self.processing_class, run)
        if problems := questions.find_unusable():
            listed = first_problems(f"{id_}: {problem}" for id_, problem in problems.items())
            raise ValueError(f"{len(problems)} questions of --eval_file cannot be asked:\n  {listed}")
        completions = {}
        was_training = self.model.training
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model,
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            model, batches = base_model(model.eval()), questions.batches()
            answer_batches(model, questions, batches, 0, completions.update, "evaluation", args.disable_tqdm)
        self.model.train(was_training)
        return evaluate(to_records(benchmark, dict(gather_object(list(completions.items())))))
