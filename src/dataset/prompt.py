"""The contract between model and grader: the question's wording, the required shape of an answer, and how an answer is
read back. No other module knows a tag or branches on a style's name.

Sources: Prompts <1>, <2>, <3> of R1-AQA (arXiv 2503.11197) and the regular expressions of its released code.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .rows import read_json

STYLE_FILE = "prompt_style.json"

# The released code's expressions, without backtracking (`(?>`, `*+`): the same matches, in linear time.
ANSWER = re.compile("<answer>.*?</answer>", re.DOTALL)
THOUGHT_AND_ANSWER = re.compile(r"<think>(?>.*?</think>\s*+<answer>).*?</answer>", re.DOTALL)
ANSWER_IN_A_LINE = re.compile("^(?>.*?<answer>)(.*?)</answer>", re.MULTILINE)


def build_solution(answer) -> str:
    """The right answer as a completion of style `answer`, the form in which solutions are stored."""
    return f"<answer>{answer}</answer>"


@dataclass(frozen=True)
class Style:
    """What a prompt asks for."""

    name: str
    instruction: str  # follows the question and its options
    shape: re.Pattern  # of a whole completion
    write: Callable[[str], str]  # answer -> completion
    thinks: bool = False  # whether thoughts precede the answer

    def target(self, answer: str) -> str:
        """The completion for supervised fine-tuning; raises a `ValueError` for a style with thoughts."""
        if self.thinks:
            raise ValueError(f"the data holds no thoughts: style {self.name} cannot be learned; use choice or answer")
        return self.write(answer)

    def reply(self, answer: str, completion: str) -> str:
        """`answer` as a whole completion, after the thoughts of `completion` if the style asks for any."""
        thoughts = completion.partition("<answer>")[0] if self.thinks else ""
        return thoughts + self.write(answer)


ANSWERING = " Output the final answer in <answer> </answer>."
THINKING = " Output the thinking process in <think> </think> and final answer in <answer> </answer>."
STYLES = {
    "choice": Style("choice", "", re.compile(".*", re.DOTALL), str),  # the paper's Prompt <1>
    "answer": Style("answer", ANSWERING, ANSWER, build_solution),  # <2>
    "think": Style("think", THINKING, THOUGHT_AND_ANSWER, build_solution, thinks=True),  # <3>
}
DEFAULT_STYLE = "answer"


def get_style(name: str) -> Style:
    """The style of this name; raises a `ValueError` that lists the known ones."""
    if name not in STYLES:
        raise ValueError(f"unknown prompt style {name!r}: choose one of {', '.join(STYLES)}")
    return STYLES[name]


def build_question(question: str, choices: list, style: str = DEFAULT_STYLE) -> str:
    """The text of the user's turn, without the audio; the choices in Python's notation, as in the paper.

    >>> print(build_question("What is it?", ["a", "b's"], "choice"))
    What is it? Please choose the answer from the following options: ['a', "b's"].
    """
    options = f" Please choose the answer from the following options: {list(choices)}."
    return question + options + get_style(style).instruction


def build_messages(text: str) -> list[dict]:
    """One user turn for `apply_chat_template`, which only counts audio parts. The processor gets the clip itself."""
    return [{"role": "user", "content": [{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": text}]}]


def matches_format(completion: str, style: str = DEFAULT_STYLE) -> bool:
    """Whether the whole completion has the shape that a prompt of this style asks for; `choice` asks for none."""
    return get_style(style).shape.fullmatch(completion) is not None


def extract_answer(completion: str) -> str:
    """Read the answer back: the first `<answer>...</answer>` on one line, else the whole text, stripped.

    >>> extract_answer("<think>a bark</think> <answer> dog </answer>")
    'dog'
    """
    found = ANSWER_IN_A_LINE.search(completion)
    return (found[1] if found else completion).strip()


def save_style(folder: str | Path, style: str) -> None:
    """Record in a checkpoint's folder the prompt style of its training, which evaluation then uses by default."""
    (Path(folder) / STYLE_FILE).write_text(json.dumps({"prompt_style": get_style(style).name}) + "\n", encoding="utf-8")


def load_style(folder: str | Path) -> str | None:
    """The prompt style that `save_style` recorded, or None; raises a `ValueError` if the record names no style."""
    path = Path(folder) / STYLE_FILE
    try:
        return get_style(read_json(path, "correct it")["prompt_style"]).name if path.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name a prompt style ({error}); correct or delete it") from error
