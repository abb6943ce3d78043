"""MMAU's official score, re-implemented: agrees digit for digit with what `evaluation.py` of github.com/Sakshi113/MMAU
(at 110127f) prints, its oddities included. MMAR, whose script derives from it, is scored by modality.

Leaves out the model and the reading of answers: a record already carries the prediction.

    python src/evaluation/mmau.py --input res_mmau_mini.json
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.rows import read_records

WORD = re.compile(r"\b\w+\b")
# Where a prediction may stand: MMAU's script reads the first, its README documents the second, MMAR uses the third.
PREDICTION_KEYS = ("model_output", "model_prediction", "answer_prediction")
# Printed first and in this order, also when a file has none of them; whatever else turns up follows.
TASKS = ("sound", "music", "speech")
DIFFICULTIES = ("easy", "hard", "medium")
MODALITIES = TASKS + ("mix-sound-music", "mix-sound-speech", "mix-music-speech", "mix-sound-music-speech")
RULE = "*" * 30


def _words(text) -> set[str]:
    r"""The set of lower-cased `\b\w+\b` words by which MMAU compares texts: order, repetition and signs are lost."""
    return set(WORD.findall(str(text).lower()))


def string_match(answer: str, prediction: str, choices: list[str]) -> bool:
    """Whether MMAU counts `prediction` as right.

    All words of the answer must be in the prediction, and no word of a wrong choice that is not also in the answer.
    So a permutation of the answer is right, and "not X" for X, "C" for "C#", "4" for "4/4": theirs, reproduced.
    """
    predicted, right = _words(prediction), _words(answer)
    if not predicted:
        return False
    wrong = set().union(*(_words(choice) - right for choice in choices))
    return right <= predicted and not wrong & predicted


@dataclass
class Scores:
    """Right answers and questions: `groups` is {title: {name: [right, questions]}} in the order of the printed text."""

    groups: dict[str, dict[str, list[int]]]
    right: int = 0
    questions: int = 0
    without_prediction: int = 0  # records that carry none: skipped, as MMAU's script skips them

    @property
    def accuracy(self) -> float:
        """Percent of the scored questions; NaN without any."""
        return 100 * self.right / self.questions if self.questions else float("nan")

    def __str__(self) -> str:
        """The printed text of MMAU's script, final newline included."""
        lines = []
        for title, group in self.groups.items():
            lines += [RULE, f"{title}-wise Accuracy:"]
            lines += [_line(f"{name} :", right, questions) for name, (right, questions) in group.items()]
        lines += [RULE, _line("Total Accuracy:", self.right, self.questions)]
        # Their script skips a record without prediction before it could be counted, so it always prints 0 here.
        lines += [RULE, "No prediction count: 0"]
        return "\n".join(lines) + "\n"


def _line(name: str, right: int, questions: int) -> str:
    percent = right / questions * 100 if questions else 0
    return f"{name} {percent:.2f}% over {questions} samples"


def evaluate(records: list[dict]) -> Scores:
    """Score records of MMAU (by task, difficulty and sub-category) or of MMAR (by modality, category and sub-category).

    Args:
        records: the benchmark's rows, each with a prediction under one of `PREDICTION_KEYS`; others are skipped.

    Returns:
        The counts; `str()` of them is the text that MMAU's script prints.

    Raises:
        ValueError: an answer is blank (as in MMAU's full test set: no score can be had here), or a key is missing.
    """
    if any("modality" in record for record in records):
        names = {"Modality": MODALITIES, "Category": (), "Sub-category": ()}
    else:
        names = {"Task": TASKS, "Difficulty": DIFFICULTIES, "Sub-category": ()}
    scores = Scores({title: {name: [0, 0] for name in known} for title, known in names.items()})
    for number, record in enumerate(records, start=1):
        prediction = get_prediction(record)
        if prediction is None:
            scores.without_prediction += 1
            continue
        for key in ("answer", "choices"):
            if key not in record:
                raise ValueError(f"record {number} ({record.get('id')}) has no `{key}`: it cannot be scored")
        if not str(record["answer"]).strip():
            raise ValueError(f"record {number} ({record.get('id')}) has a blank answer: there is no score for it")
        match = string_match(record["answer"], prediction, record["choices"])
        scores.right += match
        scores.questions += 1
        for title, group in scores.groups.items():
            if (name := record.get(title.lower())) is not None:
                count = group.setdefault(name, [0, 0])
                count[0] += match
                count[1] += 1
    return scores


def get_prediction(record: dict) -> str | None:
    """The record's prediction; `None` if it carries none."""
    for key in PREDICTION_KEYS:
        if key in record:
            return "" if record[key] is None else str(record[key])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Print MMAU's official scores of a file with predictions.")
    parser.add_argument("--input", required=True, help="JSON list or JSONL: the benchmark's rows with `model_output`")
    records = read_records(parser.parse_args().input)
    scores = evaluate(records)
    print(scores, end="")
    if scores.without_prediction:
        print(f"{scores.without_prediction} of {len(records)} records carry no prediction: skipped", file=sys.stderr)


if __name__ == "__main__":
    main()
