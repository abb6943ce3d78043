"""The table of docs/PAPER.md: the paper's values, and the results of its commands."""

import re
from pathlib import Path

from evaluation.collect import Result, read_results

PAPER = Path(__file__).resolve().parents[2] / "docs" / "PAPER.md"
# A row of its table: all cells but the last; among them the name, the average in %, the folder that its command writes.
PAPER_ROW = re.compile(
    r"(?m)^(?P<cells>\| *(?P<name>.+?) *\|.*\| *(?P<average>[\d.]+) *\|[^|]*OUT_DIR=(?P<folder>\S+).*\|).*\|$"
)


def fill_paper(text: str, folders: list[str | Path]) -> tuple[str, list[str]]:
    """The text of docs/PAPER.md with the last cell of a row filled by the best result in the one of `folders` that its
    command writes to; and a line for each skipped file or result, such as one on other questions than the paper's."""
    best: dict[str, Result] = {}  # name of a folder -> its best result
    results, skipped = read_results(*folders)
    for result in sorted(results, key=lambda result: -result.accuracy):
        if result.benchmark.is_original and result.is_real:
            best.setdefault(Path(result.folder).name, result)
        else:
            skipped.append(f"{result.folder}, {result.label}: not the paper's questions with their clips")

    def fill(row: re.Match) -> str:
        if not (found := best.get(Path(row["folder"]).name)):
            return f"{row['cells']} |"
        accuracies = " / ".join(f"{100 * right / asked:.2f}" for right, asked in found.counts.values())
        return f"{row['cells']} {found.label}: {accuracies} ({found.interval[0]:.2f} - {found.interval[1]:.2f}) |"

    return PAPER_ROW.sub(fill, text), skipped
