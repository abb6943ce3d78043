"""The paper's table with its last column filled from results on disk: python src/utils/paper_table.py exp/*

The rows are those of docs/PAPER.md. A row's results are looked for in the folder that its command writes to, `OUT_DIR`,
if that folder is among the given ones; nothing else is ever filled in. Results on other questions than MMAU's test-mini
in the paper's release do not count, since their scores do not compare.
"""

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.questions import ORIGINAL
from utils.show_acc import Result, confidence_interval, read_results

PAPER = Path(__file__).resolve().parents[2] / "docs" / "PAPER.md"
OUT_DIR = re.compile(r"OUT_DIR=(\S+)")


def format_cell(results: list[Result]) -> str:
    """The best of a row's results: step, tasks, total and its 95% interval; empty without results."""
    if not results:
        return ""
    best = max(results, key=lambda result: result.scores.accuracy)
    low, high = confidence_interval(best.scores.right, best.scores.questions)
    tasks = " / ".join(f"{100 * right / count:.2f}" for right, count in best.tasks.values())
    return f"{best.name}: {tasks} / {best.scores.accuracy:.2f} ({low:.2f} - {high:.2f})"


def fill(text: str, folders: list[Path]) -> tuple[str, list[str]]:
    """Fill the last cell of every table row whose command writes to one of `folders`.

    Args:
        text: Markdown; rows with a command hold `OUT_DIR=...`.
        folders: of runs, as `show_acc.py -i` takes them.

    Returns:
        The filled text, and one line for everything that was skipped.
    """
    found, skipped = {}, []
    for folder in folders:
        results, reasons = read_results(folder)
        skipped += reasons
        for result in results:
            if result.benchmark.release == ORIGINAL and result.scores.questions == 1000:
                found.setdefault(folder.name, []).append(result)
            else:
                skipped.append(f"{folder}, {result.name}: not MMAU's test-mini in the paper's release")
    lines = []
    for line in text.splitlines():
        if line.startswith("|") and (match := OUT_DIR.search(line)):
            cells = line.rstrip().rstrip("|").split("|")
            cells[-1] = f" {format_cell(found.get(Path(match[1]).name, []))} ".replace("  ", " ")
            line = "|".join(cells) + "|"
        lines.append(line)
    return "\n".join(lines) + "\n", skipped


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the paper's table, filled from results on disk.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders of runs, e.g. exp/*")
    args = parser.parse_args()
    text, skipped = fill(PAPER.read_text(encoding="utf-8"), args.folders)
    print("\n".join(line for line in text.splitlines() if line.startswith("|")))
    for reason in skipped:
        print(f"skipped: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
