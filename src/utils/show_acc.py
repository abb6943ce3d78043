"""The table of accuracies, from the results that `test_mmau.py` left on disk: checkpoint, each task, total.

    python src/utils/show_acc.py -i exp/model                      best first
    python src/utils/show_acc.py -i exp/model --format markdown    or csv
    python src/utils/show_acc.py -i exp/model --plot               exp/model/accuracy.png as well
    python src/utils/show_acc.py --paper exp/*                     the table of docs/PAPER.md, filled from these runs

Everything is computed anew from the predictions in `test_*/res_*.json`. Results on different questions, or on different
releases of MMAU, do not compare: they get tables of their own. What cannot be read is named and left out.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import numpy as np
import pandas as pd

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.questions import ORIGINAL, Benchmark, read_records, to_benchmark
from evaluation.mmau import Scores, evaluate

RESAMPLES = 10_000  # of the bootstrap
PAPER = Path(__file__).resolve().parents[2] / "docs" / "PAPER.md"
# A row of its table: all but the last cell; in it the name, the average in %, the folder that its command writes to.
PAPER_ROW = re.compile(
    r"(?m)^(?P<cells>\| *(?P<name>.+?) *\|.*\| *(?P<average>[\d.]+) *\|[^|]*OUT_DIR=(?P<folder>\S+).*\|).*\|$"
)


@dataclass
class Result:
    """One model on one benchmark."""

    label: str  # step, or a name
    benchmark: Benchmark
    scores: Scores
    style: str = ""
    variant: str = ""  # what else was different: `sample`, a data type, another length
    drops: dict[str, float] = field(default_factory=dict)  # `silent`, `shuffled` -> total accuracy in %

    @property
    def step(self) -> int | None:
        return int(self.label) if self.label.isdecimal() else None

    @property
    def name(self) -> str:
        return f"{self.label} ({self.variant})" if self.variant else self.label

    @property
    def tasks(self) -> dict[str, list[int]]:
        """Task or modality -> [right, questions], those that have questions."""
        return {name: count for name, count in next(iter(self.scores.groups.values())).items() if count[1]}

    @property
    def counts(self) -> dict[str, list[int]]:
        return self.tasks | {"total": [self.scores.right, self.scores.questions]}

    @property
    def interval(self) -> tuple[float, float]:
        return confidence_interval(self.scores.right, self.scores.questions)


def confidence_interval(right: int, questions: int) -> tuple[float, float]:
    """95% bootstrap interval, in %, of an accuracy: percentiles over resamples of the questions.

    A resample of n questions, k of them answered right, has Binomial(n, k / n) right answers: those are drawn, seeded.
    """
    resampled = np.random.default_rng(0).binomial(questions, right / questions, RESAMPLES) / questions
    return tuple(np.percentile(100 * resampled, [2.5, 97.5]).tolist())


def read_results(folder: str | Path) -> tuple[list[Result], list[str]]:
    """All results below a folder.

    Returns:
        The results, and one line for everything that was skipped, with the reason.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [], [f"{folder}: no such folder"]
    found, skipped = {}, []
    for path in sorted(folder.glob("test_*")):
        files = sorted([*path.glob("res_*.json"), *path.glob("res_*.jsonl")])  # none if the path is a file
        if not files:
            unfinished = any(path.glob("res_*.partial-*"))
            skipped.append(f"{path}: {'not finished yet' if unfinished else 'holds no results'}")
        for file in files:
            try:
                result, audio = _read_result(file)
                found[result.label, result.benchmark.digest, result.variant, audio] = result
            except (ValueError, OSError) as error:
                skipped.append(str(error) if str(file) in str(error) else f"{file}: {error}")
            except (KeyError, TypeError, AttributeError, RecursionError):
                skipped.append(f"{file}: not results of test_mmau.py")
    results = [result for key, result in found.items() if key[-1] == "real"]
    for (label, digest, variant, audio), result in found.items():
        heard = found.get((label, digest, variant, "real"))
        if not heard:
            skipped.append(f"{folder}/test_{label}: {audio} audio, but no result with the real one to compare it to")
        elif heard is not result:
            heard.drops[audio] = result.scores.accuracy
    return results, skipped


def _read_result(file: Path) -> tuple[Result, str]:
    """One file of predictions, and the audio that was heard: `real`, `silent` or `shuffled`."""
    records = read_records(file)
    benchmark = to_benchmark(records, file, file.parent)
    if not benchmark.has_answers:
        raise ValueError(f"{file.name} has blank answers, so there is no score; it is the file to submit")
    scores = evaluate(records)
    if scores.without_prediction:
        raise ValueError(f"{scores.without_prediction} of {len(records)} questions carry no prediction")
    name = file.stem.removeprefix("res_")
    try:
        run = json.loads(file.with_name(f"run_{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the predictions of another program, say: what is known stands in the name
        run = {"audio": next((audio for audio in ("silent", "shuffled") if audio in name), "real")}
    label = str(run.get("label") or file.parent.name.removeprefix("test_"))
    variant = "sample" if run.get("sample_seed") is not None else ""
    return Result(label, benchmark, scores, run.get("style", ""), variant), run.get("audio", "real")


def build_tables(results: list[Result], sort: str = "total") -> list[tuple[Benchmark, list[Result]]]:
    """Results that compare with one another, together; within a table best first, or by step."""
    tables: dict[str, list[Result]] = {result.benchmark.digest: [] for result in results}
    ranked = sorted(results, key=lambda result: (result.step is None, result.step or 0, result.name))
    if sort == "total":
        ranked.sort(key=lambda result: -result.scores.accuracy)  # equal ones stay by step
    for result in ranked:
        tables[result.benchmark.digest].append(result)
    return [(rows[0].benchmark, rows) for rows in tables.values()]


def _tasks(results: list[Result]) -> list[str]:
    """Tasks of these results, in the order of MMAU's script."""
    return list(dict.fromkeys(task for result in results for task in result.tasks))


def to_table(results: list[Result]) -> pd.DataFrame:
    """One table for people: accuracies in %, each with its number of questions, as text."""
    rows = []
    for result in results:
        total = result.scores.accuracy
        row = {"step": result.name, "style": result.style, "95% interval": "{:.2f} - {:.2f}".format(*result.interval)}
        row |= {name: f"{100 * right / asked:.2f} ({asked})" for name, (right, asked) in result.counts.items()}
        rows.append(row | {audio: f"{drop:.2f} ({drop - total:+.2f})" for audio, drop in result.drops.items()})
    styles = ["style"] if len({result.style for result in results}) > 1 else []
    columns = ["step", *styles, *_tasks(results), "total", "95% interval", "silent", "shuffled"]
    return pd.DataFrame(rows, columns=columns).dropna(axis=1, how="all").fillna("-")


def to_numbers(results: list[Result]) -> pd.DataFrame:
    """All results for programs: one number a cell, accuracies in %."""
    rows = []
    for result in results:
        benchmark = result.benchmark
        row = {"benchmark": benchmark.name, "release": benchmark.release, "questions": benchmark.digest}
        row |= {"step": result.name, "style": result.style}
        for name in [*_tasks(results), "total"]:
            right, asked = result.counts.get(name, (0, 0))
            row |= {name: 100 * right / asked if asked else None, f"{name}_questions": asked}
        row["low"], row["high"] = result.interval
        rows.append(row | {audio: result.drops.get(audio) for audio in ("silent", "shuffled")})
    return pd.DataFrame(rows)


def format_tables(results: list[Result], sort: str = "total", style: str = "text") -> str:
    """All tables as `text` or `markdown`, each under a line that says what was asked, or as one `csv`."""
    tables = build_tables(results, sort)
    if style == "csv":
        ranked = [result for _, results in tables for result in results]
        return to_numbers(ranked).to_csv(index=False, float_format="%.2f")
    blocks = []
    for benchmark, ranked in tables:
        table = to_table(ranked)
        if style == "markdown":  # pandas' own needs one more package
            header, *rows = [f"| {' | '.join(row)} |" for row in [list(table), *table.to_numpy().tolist()]]
            text = "\n".join(["", header, "|" + "---|" * len(table.columns), *rows])
        else:  # two spaces between columns
            text = dedent((" " + table).add_prefix(" ").to_string(index=False))
        blocks.append(f"{benchmark.title}\n{text}\n")
    return "\n".join(blocks)


def fill_paper(text: str, folders: list[str | Path]) -> tuple[str, list[str]]:
    """The text of docs/PAPER.md, a row's last cell filled from the one of `folders` that its command writes to; and one
    line for everything that was skipped.

    Results on other questions than MMAU's test-mini in the paper's release do not count: their scores do not compare.
    """
    found, skipped = {}, []
    for folder in folders:
        results, reasons = read_results(folder)
        skipped += reasons
        for result in results:
            if result.benchmark.release == ORIGINAL and result.scores.questions == 1000:
                found.setdefault(Path(folder).name, []).append(result)
            else:
                skipped.append(f"{folder}, {result.name}: not MMAU's test-mini in the paper's release")

    def fill(row: re.Match) -> str:
        results = found.get(Path(row["folder"]).name)
        if not results:
            return f"{row['cells']} |"
        best = max(results, key=lambda result: result.scores.accuracy)
        accuracies = " / ".join(f"{100 * right / asked:.2f}" for right, asked in best.counts.values())
        return f"{row['cells']} {best.name}: {accuracies} ({best.interval[0]:.2f} - {best.interval[1]:.2f}) |"

    return PAPER_ROW.sub(fill, text), skipped


def plot(results: list[Result], path: str | Path) -> None:
    """Accuracy by step as a picture, a panel for each table: tasks, total with its 95% band; named models (an untrained
    one, say) as level lines, and the paper's values where the questions are the paper's. At least one result is needed.
    """
    if not results:
        raise ValueError("there are no results to plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = build_tables(results, sort="step")
    figure, axes = pyplot.subplots(len(tables), figsize=(9, 5 * len(tables)), squeeze=False, layout="constrained")
    for axis, (benchmark, ranked) in zip(axes[:, 0], tables, strict=True):
        _plot_table(axis, benchmark, ranked)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _plot_table(axis, benchmark: Benchmark, results: list[Result]) -> None:
    steps = [result for result in results if result.step is not None and not result.variant]
    if steps:
        numbers = to_numbers(steps).set_index(pd.Index([result.step for result in steps]))
        axis.plot(numbers[_tasks(steps)], ".--", alpha=0.7, label=_tasks(steps))
        axis.plot(numbers["total"], "o-", color="black", label="total")
        axis.fill_between(numbers.index, numbers.low, numbers.high, color="black", alpha=0.15, label="95% interval")
    level = {result.name: result.scores.accuracy for result in results if result not in steps}
    if benchmark.release == ORIGINAL:
        rows = PAPER_ROW.finditer(PAPER.read_text(encoding="utf-8"))
        level |= {f"paper: {row['name']}": float(row["average"]) for row in rows}
    for index, (name, accuracy) in enumerate(level.items()):
        axis.axhline(accuracy, linestyle=":", color=f"C{5 + index}", label=f"{name} ({accuracy:.1f})")
    axis.set(title=benchmark.title, xlabel="step", ylabel="accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the accuracies of evaluated checkpoints.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-i", "--input_dir", nargs="+", help="folder(s) that hold test_*/")
    what.add_argument("--paper", nargs="*", metavar="DIR", help="only the paper's table, filled from these runs: exp/*")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("--sort", choices=("total", "step"), default="total", help="best first, or by step")
    parser.add_argument("--plot", action="store_true", help="write accuracy.png into (the first of) the folders")
    args = parser.parse_args()
    results, skipped = [], []
    if args.paper is not None:
        text, skipped = fill_paper(PAPER.read_text(encoding="utf-8"), args.paper)
        print("\n".join(line for line in text.splitlines() if line.startswith("|")))
    for folder in args.input_dir or []:
        more_results, more_skipped = read_results(folder)
        results, skipped = results + more_results, skipped + more_skipped
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    if args.paper is not None:
        return
    if not results:
        print(f"no results in {', '.join(args.input_dir)}", file=sys.stderr)
        return
    print(format_tables(results, args.sort, args.format), end="")
    if len({result.benchmark.digest for result in results}) > 1:
        print("results on different questions or releases do not compare: tables are apart", file=sys.stderr)
    if args.plot:
        path = Path(args.input_dir[0]) / "accuracy.png"
        plot(results, path)
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
