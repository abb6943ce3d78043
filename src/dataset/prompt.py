"""The contract between model and grader: the question's wording, the required shape of an answer, and how an answer is
read back. Each is defined here once, for training, reward and evaluation alike; no other module knows a tag.

Sources: Prompts <1>, <2>, <3> of R1-AQA (arXiv 2503.11197) and the regular expressions of its released code.
"""

import json
import re
from pathlib import Path

# style -> what follows the question and its options (`choice` is the paper's Prompt <1>, `answer` <2>, `think` <3>)
INSTRUCTIONS = {
    "choice": "",
    "answer": " Output the final answer in <answer> </answer>.",
    "think": " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
}
STYLES = tuple(INSTRUCTIONS)
DEFAULT_STYLE = "answer"

THINK_OPEN, ANSWER_OPEN, ANSWER_CLOSE = "<think>", "<answer>", "</answer>"
THINK_THEN_ANSWER = re.compile(r"</think>\s*<answer>")

STYLE_FILE = "prompt_style.json"


def check_style(style: str) -> str:
    """Return `style` itself, or raise a `ValueError` that lists the known ones."""
    if style not in INSTRUCTIONS:
        raise ValueError(f"unknown prompt style {style!r}: choose one of {', '.join(STYLES)}")
    return style


def build_question(question: str, choices: list, style: str = DEFAULT_STYLE) -> str:
    """The text of the user's turn, without the audio.

    >>> print(build_question("What is it?", ["a", "b's"], "choice"))
    What is it? Please choose the answer from the following options: ['a', "b's"].

    Args:
        question: taken as it is (the `video` -> `audio` replacement of AVQA is the loader's).
        choices: the options, shown in Python's list notation as in the paper.
        style: `choice`, `answer` or `think`.

    Raises:
        ValueError: unknown style.
    """
    options = f" Please choose the answer from the following options: {list(choices)}."
    return question + options + INSTRUCTIONS[check_style(style)]


def build_messages(text: str) -> list[dict]:
    """One user turn, the audio and then `text`, for the processor's `apply_chat_template`.

    The template only counts audio parts; the clip itself goes to the processor beside the text.
    """
    return [{"role": "user", "content": [{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": text}]}]


def build_solution(answer) -> str:
    """The right answer as a completion of style `answer`, the form in which AVQA's solutions are stored."""
    return f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def matches_format(completion: str, style: str = DEFAULT_STYLE) -> bool:
    r"""Whether the whole completion has the shape that the prompt asked for.

    `answer`: `<answer>.*?</answer>`; `think`: `<think>.*?</think>\s*<answer>.*?</answer>`, as `re.fullmatch` with
    `re.DOTALL` in the original, but in time linear in the completion's length. `choice` asks for no shape: always true.

    Raises:
        ValueError: unknown style.
    """
    if check_style(style) == "choice":
        return True
    opening = ANSWER_OPEN if style == "answer" else THINK_OPEN
    inner_length = len(completion) - len(opening) - len(ANSWER_CLOSE)
    if inner_length < 0 or not completion.startswith(opening) or not completion.endswith(ANSWER_CLOSE):
        return False
    if style == "answer":
        return True
    return THINK_THEN_ANSWER.search(completion, len(opening), len(opening) + inner_length) is not None


def extract_answer(completion: str) -> str:
    """Read the answer back: the first `<answer>...</answer>` on one line, else the whole text; stripped.

    Equals `re.search(r"<answer>(.*?)</answer>", completion)` of the original, in linear time.

    >>> extract_answer("<think>a bark</think> <answer> dog </answer>")
    'dog'
    """
    for line in completion.split("\n"):
        start = line.find(ANSWER_OPEN)
        if start < 0:
            continue
        start += len(ANSWER_OPEN)
        end = line.find(ANSWER_CLOSE, start)
        if end >= 0:
            return line[start:end].strip()
    return completion.strip()


def save_style(folder: str | Path, style: str) -> None:
    """Record in a checkpoint's folder the prompt style it was trained with, for evaluation to use by itself."""
    (Path(folder) / STYLE_FILE).write_text(json.dumps({"prompt_style": check_style(style)}) + "\n", encoding="utf-8")


def load_style(folder: str | Path) -> str | None:
    """The prompt style recorded in a checkpoint's folder; `None` where there is no record (or no such folder).

    Raises:
        ValueError: the record is there but unreadable or names an unknown style.
    """
    path = Path(folder) / STYLE_FILE
    if not path.is_file():
        return None
    try:
        return check_style(json.loads(path.read_text(encoding="utf-8"))["prompt_style"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name a prompt style ({error}); write it anew or delete it") from error
