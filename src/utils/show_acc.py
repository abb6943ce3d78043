"""Print the table of accuracies from the results of `test_mmau.py`: checkpoint, each task, total.

    python src/utils/show_acc.py -i exp/model                      best first
    python src/utils/show_acc.py -i exp/model --compare 100 300    the paired difference, and the questions that changed
    python src/utils/show_acc.py -i exp/model --format markdown    or csv
    python src/utils/show_acc.py -i exp/model --plot               exp/model/accuracy.png as well
    python src/utils/show_acc.py --paper exp/*                     the table of docs/PAPER.md, filled from these runs

Results on different questions, rows or clips get separate tables, followed by a table of totals. Settings that the rows
of a table share are printed above it; the others are columns. See `evaluation/collect.py`.
"""

import re
import statistics
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from textwrap import dedent

import pandas as pd

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.collect import ASKED, SETTINGS, Result, build_tables, differing, list_tasks, printable, read_results
from evaluation.mmau import get_prediction
from evaluation.statistics import compare

PAPER = Path(__file__).resolve().parents[2] / "docs" / "PAPER.md"
# A row of its table: all cells but the last; among them the name, the average in %, the folder that its command writes.
PAPER_ROW = re.compile(
    r"(?m)^(?P<cells>\| *(?P<name>.+?) *\|.*\| *(?P<average>[\d.]+) *\|[^|]*OUT_DIR=(?P<folder>\S+).*\|).*\|$"
)
# Answers (of the first seed) that name none of the choices or several, or were cut off at the token limit.
COUNTS = {"no choice": "no_choice", "several": "several", "cut off": "cut_off"}


def to_table(results: list[Result]) -> pd.DataFrame:
    """One table as text: accuracies in %, each with its number of questions."""
    rows, best = [], max(results, key=lambda result: result.accuracy)
    for result in results:
        total = result.accuracy
        row = {"step": result.row} | {column: result.settings[column] for column in differing(results)}
        row |= {name: f"{100 * right / asked:.2f} ({asked})" for name, (right, asked) in result.counts.items()}
        if len(result.runs) > 1:
            deviation = statistics.stdev(run.accuracy for run in result.runs)
            row["total"] = f"{total:.2f} +- {deviation:.2f} ({len(result.runs)} seeds)"
        row["95% interval"] = "{:.2f} - {:.2f}".format(*result.interval)
        if result is not best and len(result.runs) == len(best.runs) == 1:
            difference = compare(best.right, result.right)
            row["to the best"] = f"{difference.points:+.2f} (p {difference.p_value:.2g})"
        row |= {audio: f"{drop:.2f} ({drop - total:+.2f})" for audio, drop in result.drops.items()}
        row |= {"not asked": str(result.not_asked)} if result.not_asked else {}
        rows.append(row | {name: str(getattr(result.scores, key)) for name, key in COUNTS.items()})
    columns = ["step", *differing(results), *list_tasks(results), "total", "95% interval", "to the best"]
    columns += ["silent", "shuffled", "not asked", *COUNTS]
    return pd.DataFrame(rows, columns=columns).dropna(axis=1, how="all").fillna("-")


def to_numbers(results: list[Result]) -> pd.DataFrame:
    """All results for programs: one number per cell, accuracies in %."""
    rows = []
    for result in results:
        row: dict[str, object] = {"benchmark": result.benchmark.name, "release": result.benchmark.release}
        row |= {"questions": result.benchmark.digest, "step": result.row} | result.settings
        for name in [*list_tasks(results), "total"]:
            right, asked = result.counts.get(name, (0, 0))
            row |= {name: 100 * right / asked if asked else None, f"{name}_questions": asked}
        row["low"], row["high"] = result.interval
        row |= {"seeds": len(result.runs), "not_asked": result.not_asked}
        row |= {key: getattr(result.scores, key) for key in COUNTS.values()}
        rows.append(row | {audio: result.drops.get(audio) for audio in ("silent", "shuffled")})
    return pd.DataFrame(rows)


def format_tables(results: list[Result], sort: str = "total", style: str = "text") -> str:
    """All tables as `text` or `markdown`, each below its title and settings, or as one `csv`."""
    tables = build_tables(results, sort)
    if style == "csv":
        ranked = [result for _, results in tables for result in results]
        return to_numbers(ranked).to_csv(index=False, float_format="%.2f")
    blocks = []
    for title, ranked in tables:
        shared = {column: ranked[0].settings[column] for column in SETTINGS if column not in differing(ranked)}
        how = ", ".join(f"{column} {value}" for column, value in shared.items() if value) or "settings: not recorded"
        blocks.append(f"{title}\n{how}\n{_write_table(to_table(ranked), style)}\n")
    totals = _to_totals(tables)
    if any(cells.count("-") < len(tables) - 1 for _, *cells in totals.to_numpy().tolist()):
        blocks.append(f"total on all of these questions\n{_write_table(totals, style)}\n")
    return "\n".join(blocks)


def _to_totals(tables: list[tuple[str, list[Result]]]) -> pd.DataFrame:
    """Accuracies in % as text: a row per model and settings, a column per table; `-` where it was not evaluated."""
    rows: dict[tuple, list[str]] = {}
    for column, (_, results) in enumerate(tables, start=1):
        for result in results:
            cells = rows.setdefault(result.model, [result.name, *["-"] * len(tables)])
            cells[column] = f"{result.accuracy:.2f} ({result.scores.questions})"
    names = [f"{results[0].benchmark.name} ({results[0].benchmark.digest})" for _, results in tables]
    return pd.DataFrame(list(rows.values()), columns=["step", *names])


def _write_table(table: pd.DataFrame, style: str) -> str:
    if style == "markdown":  # pandas' own needs one more package
        header, *rows = [f"| {' | '.join(row)} |" for row in [list(table), *table.to_numpy().tolist()]]
        return "\n".join(["", header, "|" + "---|" * len(table.columns), *rows])
    return dedent((" " + table).add_prefix(" ").to_string(index=False))  # two spaces between columns


def format_comparison(results: list[Result], first: str, second: str) -> str:
    """The paired difference of two rows, given by their names, and the questions whose answer became right or wrong,
    for each table that has both. Raises a `ValueError` if a name is not that of one row, or the rows do not compare."""
    both = [(title, rows) for title, rows in build_tables(results)
            if all(any(name in (row.name, row.row) for row in rows) for name in (first, second))]  # fmt: skip
    if len(both) > 1:
        return "\n".join(f"{title}\n{format_comparison(rows, first, second)}" for title, rows in both)
    results, pair = both[0][1] if both else results, []
    for name in (first, second):
        rows = [result for result in results if name in (result.name, result.row)]
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
             f"McNemar p = {difference.p_value:.3g}; of {difference.questions} questions {difference.gained} became "
             f"right, {difference.lost} wrong"]  # fmt: skip
    for id_, record in a.records.items():
        if a.right[id_] != b.right[id_]:
            answers = f"{get_prediction(record)!r} -> {get_prediction(b.records[id_])!r}"
            sign = "+" if b.right[id_] else "-"
            lines.append(f"{sign} {id_}: {record['question']} {answers}, right is {record['answer']!r}")
    return "\n".join(lines) + "\n"


def fill_paper(text: str, folders: list[str | Path]) -> tuple[str, list[str]]:
    """The text of docs/PAPER.md with the last cell of a row filled by the best result in the one of `folders` that its
    command writes to; and a line for each skipped file or result, such as one on other questions than the paper's."""
    results, skipped = read_results(*folders)
    skipped += [f"{result.folder}, {result.label}: not MMAU's test-mini in the paper's release"
                for result in results if not result.benchmark.is_original]  # fmt: skip

    def fill(row: re.Match) -> str:
        found = [result for result in results
                 if result.benchmark.is_original and Path(result.folder).name == Path(row["folder"]).name]  # fmt: skip
        if not found:
            return f"{row['cells']} |"
        best = max(found, key=lambda result: result.accuracy)
        accuracies = " / ".join(f"{100 * right / asked:.2f}" for right, asked in best.counts.values())
        return f"{row['cells']} {best.label}: {accuracies} ({best.interval[0]:.2f} - {best.interval[1]:.2f}) |"

    return PAPER_ROW.sub(fill, text), skipped


def plot(results: list[Result], path: str | Path) -> None:
    """Draw accuracy by step, one panel per table: tasks, and the total with its 95% band. Models without a step
    are level lines, as are the paper's values for the paper's questions. Raises a `ValueError` without results."""
    if not results:
        raise ValueError("there are no results to plot")
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a folder's name may hold `$`
    from matplotlib import pyplot

    tables = build_tables(results, sort="step")
    figure, axes = pyplot.subplots(len(tables), figsize=(9, 5 * len(tables)), squeeze=False, layout="constrained")
    for axis, (title, ranked) in zip(axes[:, 0], tables, strict=True):
        axis.set(title=title, xlabel="step", ylabel="accuracy (%)")
        lines: dict[tuple[str, str], list[Result]] = {}  # (folder, settings) -> checkpoints
        for result in ranked:
            if result.step is not None:
                lines.setdefault((result.prefix, result.variant), []).append(result)
        for index, (line, steps) in enumerate(lines.items()):
            numbers = to_numbers(steps).set_index(pd.Index([result.step for result in steps]))
            if len(lines) == 1:
                axis.plot(numbers[list_tasks(steps)], ".--", alpha=0.7, label=list_tasks(steps))
            color = "black" if index == 0 else f"C{index}"
            axis.plot(numbers["total"], "o-", color=color, label=" ".join(["total", *filter(None, line)]))
            axis.fill_between(numbers.index, numbers.low, numbers.high, color=color, alpha=0.15, label="95% interval")
        level = {result.name: result.accuracy for result in ranked if result.step is None}
        if ranked[0].benchmark.is_original:
            rows = PAPER_ROW.finditer(PAPER.read_text(encoding="utf-8"))
            level |= {f"paper: {row['name']}": float(row["average"]) for row in rows}
        for index, (name, accuracy) in enumerate(level.items()):
            axis.axhline(accuracy, linestyle=":", color=f"C{5 + index}", label=f"{name} ({accuracy:.1f})")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = ArgumentParser(description="Print the accuracies of evaluated checkpoints.", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-i", "--input_dir", nargs="+", help="folder(s) that hold test_*/")
    what.add_argument("--paper", nargs="*", metavar="DIR", help="only the paper's table, filled from these runs: exp/*")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two rows of the table: how B differs from A")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("--sort", choices=("total", "step"), default="total", help="best first, or by step")
    parser.add_argument("--plot", action="store_true", help="write accuracy.png into (the first of) the folders")
    try:
        _show(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(printable(f"show_acc: {error}"))


def _show(args: Namespace) -> None:
    results: list[Result] = []
    if args.paper is not None:
        text, skipped = fill_paper(PAPER.read_text(encoding="utf-8"), args.paper)
        print("\n".join(line for line in text.splitlines() if line.startswith("|")))
    else:
        results, skipped = read_results(*args.input_dir)
    for line in skipped:
        print(printable(f"skipped {line}"), file=sys.stderr)
    if args.paper is None and not results:
        print(f"no results in {', '.join(args.input_dir)}", file=sys.stderr)
    elif args.compare and results:
        print(printable(format_comparison(results, *args.compare)), end="")
    elif results:
        print(printable(format_tables(results, args.sort, args.format)), end="")
        if len({result.asked for result in results}) > 1:
            print("results on different questions, rows or clips do not compare: see separate tables", file=sys.stderr)
        if args.plot:
            plot(results, path := Path(args.input_dir[0]) / "accuracy.png")
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
