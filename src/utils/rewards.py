"""The paper's two rewards, with the signature TRL calls: one float for each completion.

What an answer looks like is `dataset/prompt.py`'s business. There is no `except` here: an error in a grader must stop
the run, not look like a bad model. The original's math-verify step is left out on purpose: it pays wrong answers that
share a number with the right one.
"""

from dataset.prompt import extract_answer, matches_format


def _text(completion: str | list[dict]) -> str:
    """A completion's text, whether TRL passes it plain or as a conversation of one assistant message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def accuracy_reward(completions: list, solution: list[str], **kwargs) -> list[float]:
    """1.0 where the answer read back from the completion equals the solution's, exactly; else 0.0.

    Args:
        completions: B texts, or B conversations of one message.
        solution: B solutions, each as `<answer>...</answer>` or plain.

    Returns:
        B floats.
    """
    return [
        float(extract_answer(_text(completion)) == extract_answer(right))
        for completion, right in zip(completions, solution, strict=True)
    ]


def format_reward(completions: list, style: list[str], **kwargs) -> list[float]:
    """1.0 where the whole completion has the shape its prompt style asked for; else 0.0.

    Args:
        completions: B texts, or B conversations of one message.
        style: B prompt styles, the data set's column.

    Returns:
        B floats.
    """
    return [float(matches_format(_text(text), asked)) for text, asked in zip(completions, style, strict=True)]
