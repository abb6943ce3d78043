"""Greedy accuracy on a question file during training, by the evaluation that `test_mmau.py` uses on a checkpoint.

Mixin for the trainers. Every process answers its share; the scores are those of the official script, per task and in
total, in percent, and go where all metrics go: `eval_accuracy`, `eval_accuracy_sound`, ... A question whose clip breaks
during the run is left out from then on; `eval_left_out` counts them.
"""

import logging
import re
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from trl.models import unwrap_model_for_generation

from dataset.prompt import DEFAULT_STYLE
from dataset.questions import Benchmark
from dataset.rows import DataError, first_problems
from evaluation.answers import EncodedQuestions, answer_batches, load_clips
from evaluation.mmau import Scores, evaluate
from evaluation.results import MAX_NEW_TOKENS, Completion, Run, to_records
from model.qwen2_audio import base_model

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # at an evaluation in which clips break; then the disk is to blame


class GreedyAccuracy:
    """To stand before the trainer class, to whose arguments it adds `eval_questions`."""

    max_completion_length: int = MAX_NEW_TOKENS  # GRPO's is its setting
    left_out = 0  # questions that could not be asked any more

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
        if self.left_out:
            metrics[f"{metric_key_prefix}_left_out"] = self.left_out
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score_eval_questions(self) -> Scores:
        """The scores of all questions that can be asked. Clips are decoded before the first question; where one breaks
        afterwards, all are asked again without it."""
        for _ in range(ATTEMPTS):
            questions, error = self._encode_eval_questions(), None
            try:
                completions = self._ask(questions)
            except (DataError, OSError) as raised:
                completions, error = {}, raised
            if not any(gather_object([error is not None])):
                break
        else:
            raise error or DataError("--eval_file: the clips cannot be read in another process")
        assert self.eval_questions is not None
        asked = replace(self.eval_questions, questions=questions.questions)
        return evaluate(to_records(asked, dict(gather_object(list(completions.items())))))

    def _encode_eval_questions(self) -> EncodedQuestions:
        """`eval_questions` as the model's inputs. One that cannot be asked any more is named, and left out from now on:
        accuracies of later steps are over the same questions."""
        args, benchmark = self.args, self.eval_questions
        assert benchmark is not None
        run = Run(
            style=self.prompt_style or DEFAULT_STYLE,
            channels=self.audio_channels,
            max_new_tokens=self.max_completion_length,
            batch_size=args.per_device_eval_batch_size,
        )
        clips = load_clips(benchmark.questions, run.channels)
        questions = EncodedQuestions(benchmark.questions, clips, self.processing_class, run)
        if problems := questions.find_unusable():
            self.left_out += len(problems)
            questions = questions.without(problems)
            self.eval_questions = replace(benchmark, questions=questions.questions)
            if self.accelerator.is_main_process:
                listed = first_problems(f"{id_}: {problem}" for id_, problem in problems.items())
                logger.warning(f"{len(problems)} questions of --eval_file are left out from now on:\n  {listed}")
        return questions

    def _ask(self, questions: EncodedQuestions) -> dict[str, Completion]:
        """This process's share of the answers, by the questions' ids."""
        completions: dict[str, Completion] = {}
        args = self.args
        if not questions.questions:
            return completions
        was_training = self.model.training
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model,
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            model, batches = base_model(model.eval()), questions.batches()
            try:
                answer_batches(model, questions, batches, 0, completions.update, "evaluation", args.disable_tqdm)
            finally:
                self.model.train(was_training)
        return completions
