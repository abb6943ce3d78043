"""MMAU's official score, re-implemented: agrees digit for digit with what `evaluation.py` of github.com/Sakshi113/MMAU
(at 110127f) prints, its oddities included. MMAR, whose script derives from it, is scored by modality.

Leaves out the model and the reading of answers: a record already carries the prediction.

    python src/evaluation/mmau.py --input res_mmau_mini.json
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from command_line import ArgumentParser
from dataset.rows import read_records

WORD = re.compile(r"\b\w+\b")
# Where a prediction may stand: MMAU's script reads the first, its README documents the second, MMAR uses the third.
PREDICTION_KEYS = ("model_output", "model_prediction", "answer_prediction")
# Printed first and in this order, also when a file has none of them; whatever else turns up follows.
TASKS = ("sound", "music", "speech")
DIFFICULTIES = ("easy", "hard", "medium")
MODALITIES = TASKS + ("mix-sound-music", "mix-sound-speech", "mix-music-speech", "mix-sound-music-speech")
LAYERS = ("Signal Layer", "Perception Layer", "Semantic Layer", "Cultural Layer")
MATCH_RULE = "MMAU string_match at 110127f"  # what decides whether an answer is right
CUT_OFF = "model_cut_off"  # key of a record: whether the answer reached the token limit before its end
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


def named_choices(prediction: str, choices: list[str]) -> int:
    """How many choices a prediction names: those of which it holds all words, but for those that lie within another."""
    named = {frozenset(_words(choice)) for choice in choices if _words(choice) <= _words(prediction)} - {frozenset()}
    return sum(not any(words < other for other in named) for words in named)


@dataclass
class Scores:
    """Right answers and questions: `groups` is {title: {name: [right, questions]}} in the order of the printed text."""

    groups: dict[str, dict[str, list[int]]]
    matches: list[bool] = field(default_factory=list)  # of each record: whether it is right
    # What tells a bad model from a bad prompt: answers that name none of the choices, several, or were cut off.
    no_choice: int = 0
    several: int = 0
    cut_off: int = 0

    @property
    def right(self) -> int:
        return sum(self.matches)

    @property
    def questions(self) -> int:
        return len(self.matches)

    @property
    def accuracy(self) -> float:
        """Percent; NaN without any question."""
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
        records: the benchmark's rows, each with a prediction under one of `PREDICTION_KEYS`.

    Returns:
        The counts; `str()` of them is the text that MMAU's script prints.

    Raises:
        ValueError: a record has no prediction (the official scripts leave it out of the score without a word), no
            choices or no answer (as in MMAU's full test set: no score can be had here), or a group that is no text.
    """
    if any("modality" in record for record in records):
        names = {"Modality": MODALITIES, "Category": LAYERS, "Sub-category": ()}
    else:
        names = {"Task": TASKS, "Difficulty": DIFFICULTIES, "Sub-category": ()}
    scores = Scores({title: {name: [0, 0] for name in known} for title, known in names.items()})
    for number, record in enumerate(records, start=1):
        where = f"record {number} ({record.get('id')})"
        prediction = get_prediction(record)
        if prediction is None:
            keys = ", ".join(f"`{key}`" for key in PREDICTION_KEYS)
            raise ValueError(f"{where} carries no prediction under any of {keys}: have the model asked again")
        for key in ("answer", "choices"):
            if key not in record:
                raise ValueError(f"{where} has no `{key}`: it cannot be scored")
        if not str(record["answer"]).strip():
            raise ValueError(f"{where} has a blank answer: there is no score for it")
        choices = record["choices"]
        scores.matches.append(string_match(record["answer"], prediction, choices))
        named = named_choices(prediction, choices)
        scores.no_choice += named == 0
        scores.several += named > 1
        scores.cut_off += bool(record.get(CUT_OFF))
        for title, group in scores.groups.items():
            name = record.get(title.lower())
            if name is not None and not isinstance(name, str):
                raise ValueError(f"{where}: `{title.lower()}` is {name!r:.80}, not a text")
            if name is not None:
                count = group.setdefault(name, [0, 0])
                count[0] += scores.matches[-1]
                count[1] += 1
    return scores


def get_prediction(record: dict) -> str | None:
    """The record's prediction; `None` if it carries none."""
    return next((str(record[key]) for key in PREDICTION_KEYS if record.get(key) is not None), None)


def main() -> None:
    parser = ArgumentParser(description="Print MMAU's official scores of a file with predictions.")
    parser.add_argument("--input", required=True, help="JSON list or JSONL: the benchmark's rows with `model_output`")
    path = parser.parse_args().input
    try:
        print(evaluate(read_records(path)), end="")
    except (ValueError, OSError) as error:
        sys.exit(f"mmau: {error}" if str(path) in str(error) else f"mmau: {path}: {error}")


if __name__ == "__main__":
    main()
