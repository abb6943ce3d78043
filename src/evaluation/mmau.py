"""MMAU's official score of records with predictions: the same text, digit for digit, as `evaluation.py` of
github.com/Sakshi113/MMAU (at 110127f) prints, oddities included. MMAR's script derives from it.

    python src/evaluation/mmau.py --input res_mmau_mini.json
"""

import re
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.rows import read_records

# Keys of a prediction: MMAU's script reads the first, its README documents the second, MMAR uses the third.
PREDICTION_KEYS = ("model_output", "model_prediction", "answer_prediction")
# Groups that are printed first and in this order, even without records. Other names follow.
TASKS = ("sound", "music", "speech")
MMAU = {"Task": TASKS, "Difficulty": ("easy", "hard", "medium"), "Sub-category": ()}
MIXES = ("mix-sound-music", "mix-sound-speech", "mix-music-speech", "mix-sound-music-speech")
LAYERS = ("Signal Layer", "Perception Layer", "Semantic Layer", "Cultural Layer")
MMAR = {"Modality": TASKS + MIXES, "Category": LAYERS, "Sub-category": ()}
MATCH_RULE = "MMAU string_match at 110127f"  # decides whether an answer is right
CUT_OFF = "model_cut_off"  # key of a record: whether the token limit cut the answer off


def _words(text) -> set[str]:
    """The lower-cased words by which MMAU compares texts, without order, repetition and punctuation."""
    return set(re.findall(r"\b\w+\b", str(text).lower()))


def string_match(answer: str, prediction: str, choices: list[str]) -> bool:
    """Whether MMAU counts `prediction` as right: it has all words of the answer, and no other word of a wrong choice.
    As in the original, a permutation of the answer is right, and so are "not X" for X, "C" for "C#", "4" for "4/4"."""
    predicted, right = _words(prediction), _words(answer)
    if not predicted:
        return False
    wrong = set().union(*(_words(choice) - right for choice in choices))
    return right <= predicted and not wrong & predicted


def named_choices(prediction: str, choices: list[str]) -> int:
    """The number of choices whose words are all in the prediction, without those contained in another such choice."""
    named = {frozenset(_words(choice)) for choice in choices if _words(choice) <= _words(prediction)} - {frozenset()}
    return sum(not any(words < other for other in named) for words in named)


@dataclass
class Scores:
    """Right answers and questions: `groups` is {title: {name: [right, questions]}} in the order of the printed text."""

    groups: dict[str, dict[str, list[int]]]
    matches: list[bool] = field(default_factory=list)  # for each record, whether it is right
    no_choice: int = 0  # answers that name no choice; many of them show a bad prompt rather than a bad model
    several: int = 0  # answers that name several choices
    cut_off: int = 0  # answers that reached the token limit

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
        """The text that MMAU's script prints. Its last line is always 0, since it skips such records uncounted."""
        text, rule = "", "*" * 30 + "\n"
        for title, group in self.groups.items():
            counts = (_line(f"{name} :", right, questions) for name, (right, questions) in group.items())
            text += f"{rule}{title}-wise Accuracy:\n{''.join(counts)}"
        return f"{text}{rule}{_line('Total Accuracy:', self.right, self.questions)}{rule}No prediction count: 0\n"


def _line(name: str, right: int, questions: int) -> str:
    return f"{name} {right / max(questions, 1) * 100:.2f}% over {questions} samples\n"


def evaluate(records: list[dict]) -> Scores:
    """Score records of MMAU or MMAR: the benchmark's rows, each with a prediction under one of `PREDICTION_KEYS`.

    Raises a `ValueError` if a record has no prediction (the official scripts silently omit it), no choices, a blank
    answer (as in MMAU's full test set), or a group that is no text.
    """
    titles = MMAR if any("modality" in record for record in records) else MMAU
    scores = Scores({title: {name: [0, 0] for name in known} for title, known in titles.items()})
    for number, record in enumerate(records, start=1):
        where = f"record {number} ({record.get('id')})"
        prediction = get_prediction(record)
        if prediction is None:
            raise ValueError(f"{where} has no prediction under any of {', '.join(PREDICTION_KEYS)}; evaluate it again")
        if "choices" not in record or not str(record.get("answer", "")).strip():
            raise ValueError(f"{where} has no `choices` or a blank `answer`, so it cannot be scored")
        scores.matches.append(string_match(record["answer"], prediction, record["choices"]))
        named = named_choices(prediction, record["choices"])
        scores.no_choice += named == 0
        scores.several += named > 1
        scores.cut_off += bool(record.get(CUT_OFF))
        for title, group in scores.groups.items():
            if (name := record.get(title.lower())) is None:
                continue
            if not isinstance(name, str):
                raise ValueError(f"{where}: `{title.lower()}` is {name!r:.80}, not a text")
            count = group.setdefault(name, [0, 0])
            count[0] += scores.matches[-1]
            count[1] += 1
    return scores


def get_prediction(record: dict) -> str | None:
    """A record's prediction, or None."""
    return next((str(record[key]) for key in PREDICTION_KEYS if record.get(key) is not None), None)


if __name__ == "__main__":
    parser = ArgumentParser(description="Print MMAU's official scores of a file with predictions.", allow_abbrev=False)
    parser.add_argument("--input", required=True, help="JSON list or JSONL: the benchmark's rows with `model_output`")
    path = parser.parse_args().input
    try:
        print(evaluate(read_records(path)), end="")
    except (ValueError, OSError) as error:
        sys.exit(f"mmau: {error}" if str(path) in str(error) else f"mmau: {path}: {error}")
