"""Print the table of accuracies from the results of `test_mmau.py`: checkpoint, each task, total.

    python src/utils/show_acc.py -i exp/model                      best first
    python src/utils/show_acc.py -i exp/model --compare 100 300    the paired difference, and the questions that changed
    python src/utils/show_acc.py --paper exp/*                     the table of docs/PAPER.md, filled from these runs

Results on different questions, rows or clips get separate tables. Settings that the rows of a table share are printed
above it; the others are columns. A terminal gets the columns that fit, a file all. See `evaluation/collect.py`.
"""

import shutil
import statistics
import sys
from argparse import ArgumentParser
from math import inf
from pathlib import Path
from textwrap import dedent

import pandas as pd

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.collect import ASKED, SETTINGS, Result, build_tables, differing, read_results
from evaluation.mmau import get_prediction
from evaluation.statistics import compare
from utils.paper import PAPER, fill_paper
from utils.text import printable

# Answers (of the first seed) that name none of the choices or several, or were cut off at the token limit.
COUNTS = {"no choice": "no_choice", "several": "several", "cut off": "cut_off"}


def to_table(results: list[Result]) -> pd.DataFrame:
    """One table as text: accuracies in %, each with its number of questions."""
    rows, best = [], max(results, key=lambda result: result.accuracy)
    for result in results:
        row = {"step": result.row} | {column: result.settings[column] for column in differing(results)}
        row |= {name: f"{100 * right / asked:.2f} ({asked})" for name, (right, asked) in result.counts.items()}
        if len(result.runs) > 1:
            deviation = statistics.stdev(run.accuracy for run in result.runs)
            row["total"] = f"{result.accuracy:.2f} +- {deviation:.2f} ({len(result.runs)} seeds)"
        row["95% interval"] = "{:.2f} - {:.2f}".format(*result.interval)
        if result is not best and len(result.runs) == len(best.runs) == 1:
            difference = compare(best.right, result.right)
            row["to the best"] = f"{difference.points:+.2f} (p {difference.p})"
        row |= {"not asked": str(result.not_asked)} if result.not_asked else {}
        rows.append(row | {name: str(getattr(result.scores, key)) for name, key in COUNTS.items()})
    tasks = dict.fromkeys(task for result in results for task in result.counts if task != "total")
    columns = ["step", *differing(results), *tasks, "total", "95% interval", "to the best", "not asked", *COUNTS]
    return pd.DataFrame(rows, columns=columns).dropna(axis=1, how="all").fillna("-")


def format_tables(results: list[Result], sort: str = "total", width: float = inf) -> str:
    """All tables, each below its title and settings. Columns over a `width` in characters are omitted."""
    blocks = []
    for title, ranked in build_tables(results, sort):
        kept = ["step", *differing(ranked), "total"]
        shared = {column: ranked[0].settings[column] for column in SETTINGS if column not in kept}
        how = ", ".join(f"{column} {value}" for column, value in shared.items() if value not in ("", "real"))
        table, omitted = to_table(ranked), list[str]()
        while (text := _to_text(table)).index("\n") > width and len(table.columns) > len(kept):
            last = [column for column in table if column not in kept][-1]
            table, omitted = table.drop(columns=last), [last, *omitted]
        note = f"too wide for the terminal: {', '.join(omitted)}\n" if omitted else ""
        blocks.append(f"{title}\n{how or 'settings: not recorded'}\n{text}\n{note}")
    return "\n".join(blocks)


def _to_text(table: pd.DataFrame) -> str:
    return dedent((" " + table).add_prefix(" ").to_string(index=False))  # two spaces between columns


def format_comparison(results: list[Result], first: str, second: str) -> str:
    """The paired difference of two rows, given by their names, and the questions whose answer became right or wrong,
    for each table that has both. Raises a `ValueError` if a name is not that of one row, or the rows do not compare."""
    tables = build_tables(results, "step")
    both = [(title, rows) for title, rows in tables
            if all(any(name in (row.name, row.row) for row in rows) for name in (first, second))]  # fmt: skip
    if len(both) > 1:
        return "\n".join(f"{title}\n{format_comparison(rows, first, second)}" for title, rows in both)
    results, pair = both[0][1] if both else [result for _, rows in tables for result in rows], []
    for name in (first, second):
        rows = [result for result in results if name == result.name or name == result.row and result.is_real]
        if len(rows) != 1:
            names = ", ".join(result.name for result in results)
            raise ValueError(f"{len(rows)} results are called {name!r}; choose among: {names}")
        pair += rows
    a, b = pair
    if other := [key for key, x, y in zip(("questions", *ASKED), a.asked, b.asked, strict=True) if x != y]:
        raise ValueError(f"{first} and {second} do not compare: {', '.join(other)} differ")
    if len(a.runs) + len(b.runs) > 2:
        raise ValueError(f"{first} or {second} is the mean of several seeds; only single runs are compared by question")
    difference = compare(a.right, b.right)
    low, high = difference.interval
    lines = [f"{b.name} - {a.name}: {difference.points:+.2f} points (95% interval {low:+.2f} to {high:+.2f}), exact "
             f"McNemar p = {difference.p}; of {difference.questions} questions {difference.gained} became right, "
             f"{difference.lost} wrong"]  # fmt: skip
    for id_, record in a.records.items():
        if a.right[id_] != b.right[id_]:
            answers = f"{get_prediction(record)!r} -> {get_prediction(b.records[id_])!r}, right is {record['answer']!r}"
            lines.append(f"{'+' if b.right[id_] else '-'} {id_}: {record['question']} {answers}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ArgumentParser(description="Print the accuracies of evaluated checkpoints.", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-i", "--input_dir", nargs="+", help="folder(s) that hold test_*/")
    what.add_argument("--paper", nargs="*", metavar="DIR", help="only the paper's table, filled from these runs: exp/*")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two rows of the table: how B differs from A")
    parser.add_argument("--sort", choices=("total", "step"), default="total", help="best first, or by step")
    args = parser.parse_args()
    text, results = "", list[Result]()
    try:
        if args.paper is not None:
            text, skipped = fill_paper(PAPER.read_text(encoding="utf-8"), args.paper)
            text = "".join(line for line in text.splitlines(keepends=True) if line.startswith("|"))
        else:
            results, skipped = read_results(*args.input_dir)
            skipped += [] if results else [f"all: no results in {', '.join(args.input_dir)}"]
        print(*(printable(f"skipped {line}\n") for line in skipped), sep="", end="", file=sys.stderr)
        if results and args.compare:
            text = format_comparison(results, *args.compare)
        elif results:
            columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else inf
            text = format_tables(results, args.sort, columns)
        print(printable(text), end="")
    except (ValueError, OSError) as error:
        sys.exit(printable(f"show_acc: {error}"))
    if len({result.asked for result in results}) > 1:
        print("results on different questions, rows or clips do not compare: see separate tables", file=sys.stderr)


if __name__ == "__main__":
    main()
