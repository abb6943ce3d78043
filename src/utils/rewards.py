"""The paper's two rewards, with TRL's signature: one float for each completion.

`dataset/prompt.py` defines what an answer looks like. There is no `except`: an error in a grader must stop the run, not
look like a bad model. The original's math-verify step is omitted, since it rewards wrong answers that share a number
with the right one.
"""

from dataset.prompt import extract_answer, matches_format


def _text(completion: str | list[dict]) -> str:
    """The text of a completion, which TRL passes plain or as a conversation of one assistant message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def accuracy_reward(completions: list, solution: list[str], **kwargs) -> list[float]:
    """For each of B completions 1.0 if its answer equals the solution's exactly, else 0.0.

    Args:
        completions: B texts, or B conversations of one message.
        solution: B solutions, each as `<answer>...</answer>` or plain.
    """
    return [
        float(extract_answer(_text(completion)) == extract_answer(right))
        for completion, right in zip(completions, solution, strict=True)
    ]


def format_reward(completions: list, style: list[str], **kwargs) -> list[float]:
    """For each of B completions 1.0 if it has the shape that its prompt style asks for, else 0.0.

    Args:
        completions: B texts, or B conversations of one message.
        style: B prompt styles, a column of the data set.
    """
    return [float(matches_format(_text(text), asked)) for text, asked in zip(completions, style, strict=True)]
