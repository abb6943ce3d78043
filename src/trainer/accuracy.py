"""Greedy accuracy on a question file during training, by the evaluation that `test_mmau.py` uses on a checkpoint.

Mixin for the trainers. Every process answers its share; the scores are those of the official script, per task and in
total, in percent, and go where all metrics go: `eval_accuracy`, `eval_accuracy_sound`, ...
"""

import re

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl.models import unwrap_model_for_generation

from dataset.prompt import build_question, extract_answer
from dataset.questions import Benchmark
from evaluation.answers import EncodedQuestions, Settings, answer_batches, check_clips, find_unusable, make_batches
from evaluation.mmau import Scores, evaluate
from model.qwen2_audio import base_model


def as_eval_dataset(benchmark: Benchmark, style: str) -> Dataset:
    """The questions as the data set that `Trainer` wants to know of."""
    return Dataset.from_list(
        [
            {
                "prompt": build_question(question.record["question"], question.record["choices"], style),
                "audio_path": question.audio_path,
            }
            for question in benchmark.questions
        ]
    )


class GreedyAccuracy:
    """Mixin, to stand before the trainer class; `eval_questions` are asked by `evaluate` if they are set."""

    eval_questions: Benchmark | None = None
    eval_max_new_tokens: int = 256

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
        args, accelerator = self.args, self.accelerator
        channels = self.audio_channels
        settings = Settings(self.prompt_style, channels=channels, max_new_tokens=self.eval_max_new_tokens)
        paths = sorted({question.audio_path for question in self.eval_questions.questions})
        samples, decoded = check_clips(paths, args.dataloader_num_workers, channels)
        questions = EncodedQuestions(self.eval_questions.questions, self.processing_class, settings, decoded)
        if problems := find_unusable(questions, samples):
            listed = "\n  ".join(f"{id_}: {problem}" for id_, problem in list(problems.items())[:10])
            raise ValueError(f"{len(problems)} questions of --eval_file cannot be asked:\n  {listed}")
        batches = make_batches(questions, samples, args.per_device_eval_batch_size)
        share = batches[accelerator.process_index :: accelerator.num_processes]
        completions = {}
        was_training = self.model.training
        with (
            unwrap_model_for_generation(self.model_wrapped, accelerator) as model,
            torch.no_grad(),
            accelerator.autocast(),
        ):
            model.eval()
            quiet = args.disable_tqdm or not accelerator.is_main_process
            answer_batches(base_model(model), questions, share, 0, completions.update, "evaluation", quiet)
            model.train(was_training)
        answers = dict(gather_object(list(completions.items())))
        return evaluate(
            [
                question.record | {"model_prediction": extract_answer(answers[question.id])}
                for question in self.eval_questions.questions
            ]
        )
