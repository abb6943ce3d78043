"""The table of accuracies, from the results that `test_mmau.py` left on disk: checkpoint, each task, total.

    python src/utils/show_acc.py -i exp/model                      best first
    python src/utils/show_acc.py -i exp/model --format markdown    or csv
    python src/utils/show_acc.py -i exp/model --plot               exp/model/accuracy.png as well

Everything is computed anew from the predictions in `test_*/res_*.json`. Results on different questions, or on different
releases of MMAU, do not compare: they get tables of their own. What cannot be read is named and left out.
"""

import argparse
import csv
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.questions import ORIGINAL, Benchmark, read_records, to_benchmark
from evaluation.mmau import Scores, evaluate

FORMATS = ("text", "markdown", "csv")
RESAMPLES = 10_000  # of the bootstrap
# MMAU test-mini, original release, from the paper (arXiv 2503.11197): total accuracy in %.
PAPER = {"paper: GRPO <2>": 64.50, "paper: SFT LoRA <1>": 56.40, "paper: Qwen2-Audio-7B-Instruct": 49.20}


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


def confidence_interval(right: int, questions: int) -> tuple[float, float]:
    """95% bootstrap interval, in %, of an accuracy: percentiles over resamples of the questions.

    A resample of n questions, k of them answered right, has Binomial(n, k / n) right answers: those are drawn, seeded.
    """
    resampled = np.random.default_rng(0).binomial(questions, right / questions, RESAMPLES) / questions
    low, high = np.percentile(100 * resampled, [2.5, 97.5])
    return float(low), float(high)


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
        files = sorted([*path.glob("res_*.json"), *path.glob("res_*.jsonl")]) if path.is_dir() else []
        if not files:
            unfinished = any(path.glob("res_*.partial-*")) if path.is_dir() else False
            skipped.append(f"{path}: {'not finished yet' if unfinished else 'holds no results'}")
        for file in files:
            try:
                result, audio = _read_result(file)
            except (ValueError, OSError) as error:
                skipped.append(str(error) if str(file) in str(error) else f"{file}: {error}")
                continue
            except (KeyError, TypeError, AttributeError, RecursionError):
                skipped.append(f"{file}: not results of test_mmau.py")
                continue
            found[result.label, result.benchmark.digest, result.variant, audio] = result
    results = [result for key, result in found.items() if key[-1] == "real"]
    for (label, digest, variant, audio), result in found.items():
        if audio != "real":
            heard = found.get((label, digest, variant, "real"))
            if heard:
                heard.drops[audio] = result.scores.accuracy
            else:
                skipped.append(
                    f"{folder}/test_{label}: {audio} audio, but no result with the real one to compare it to"
                )
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
    tables: dict[str, list[Result]] = {}
    for result in results:
        tables.setdefault(result.benchmark.digest, []).append(result)

    def by_step(result: Result) -> tuple:
        return (result.step is None, result.step or 0, result.name)

    def by_total(result: Result) -> tuple:
        return (-result.scores.accuracy, by_step(result))

    key = by_total if sort == "total" else by_step
    return [(rows[0].benchmark, sorted(rows, key=key)) for rows in tables.values()]


def table_columns(results: list[Result]) -> list[str]:
    """Tasks of a table's results, in the order of MMAU's script."""
    return list(dict.fromkeys(task for result in results for task in result.tasks))


def table_rows(results: list[Result]) -> list[list[str]]:
    """Header and rows of one table, for people: accuracies in %, each with its number of questions."""
    tasks = table_columns(results)
    audios = [audio for audio in ("silent", "shuffled") if any(audio in result.drops for result in results)]
    styles = len({result.style for result in results}) > 1
    rows = [["step", *(["style"] if styles else []), *tasks, "total", "95% interval", *audios]]
    for result in results:
        total = result.scores.accuracy
        low, high = confidence_interval(result.scores.right, result.scores.questions)
        cells = [result.name, *([result.style] if styles else [])]
        cells += [_cell(*result.tasks[task]) if task in result.tasks else "-" for task in tasks]
        cells += [_cell(result.scores.right, result.scores.questions), f"{low:.2f} - {high:.2f}"]
        for audio in audios:
            drop = result.drops.get(audio)
            cells.append("-" if drop is None else f"{drop:.2f} ({drop - total:+.2f})")
        rows.append(cells)
    return rows


def _cell(right: int, questions: int) -> str:
    return f"{100 * right / questions:.2f} ({questions})"


def csv_rows(tables: list[tuple[Benchmark, list[Result]]]) -> list[list]:
    """Header and rows of all tables, for programs: one number a cell, accuracies in %."""
    tasks = table_columns([result for _, results in tables for result in results])
    counts = [column for task in [*tasks, "total"] for column in (task, f"{task}_questions")]
    rows = [["benchmark", "release", "questions", "step", "style", *counts, "low", "high", "silent", "shuffled"]]
    for benchmark, results in tables:
        for result in results:
            scores = result.scores
            row = [benchmark.name, benchmark.release, benchmark.digest, result.name, result.style]
            for right, questions in [
                *(result.tasks.get(task, (0, 0)) for task in tasks),
                (scores.right, scores.questions),
            ]:
                row += [f"{100 * right / questions:.2f}" if questions else "", questions]
            row += [f"{bound:.2f}" for bound in confidence_interval(scores.right, scores.questions)]
            row += [f"{result.drops[audio]:.2f}" if audio in result.drops else "" for audio in ("silent", "shuffled")]
            rows.append(row)
    return rows


def format_tables(results: list[Result], sort: str = "total", style: str = "text") -> str:
    """All tables as `text` or `markdown`, each under a line that says what was asked, or as one `csv`."""
    tables = build_tables(results, sort)
    if style == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(csv_rows(tables))
        return text.getvalue()
    blocks = []
    for benchmark, ranked in tables:
        rows = table_rows(ranked)
        if style == "markdown":
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            lines[1:1] = ["|" + "---|" * len(rows[0])]
            lines[:0] = [""]
        else:
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        blocks.append("\n".join([benchmark.title, *lines]) + "\n")
    return "\n".join(blocks)


def plot(results: list[Result], path: str | Path) -> None:
    """Accuracy by step as a picture, a panel for each table: tasks, total with its 95% band; named models (an untrained
    one, say) as level lines, and the paper's values where the questions are the paper's.

    Raises:
        ValueError: there are no results.
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
    for task in dict.fromkeys(task for result in steps for task in result.tasks):
        points = [(result.step, result.tasks[task]) for result in steps if task in result.tasks]
        axis.plot(
            [step for step, _ in points],
            [100 * right / asked for _, (right, asked) in points],
            ".--",
            alpha=0.7,
            label=task,
        )
    if steps:
        x = [result.step for result in steps]
        bands = [confidence_interval(result.scores.right, result.scores.questions) for result in steps]
        (line,) = axis.plot(x, [result.scores.accuracy for result in steps], "o-", color="black", label="total")
        axis.fill_between(x, *zip(*bands, strict=True), color=line.get_color(), alpha=0.15, label="95% interval")
    level = {result.name: result.scores.accuracy for result in results if result not in steps}
    if benchmark.release == ORIGINAL:
        level |= PAPER
    for index, (name, accuracy) in enumerate(level.items()):
        axis.axhline(accuracy, linestyle=":", color=f"C{5 + index}", label=f"{name} ({accuracy:.1f})")
    axis.set(title=benchmark.title, xlabel="step", ylabel="accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the accuracies of evaluated checkpoints.")
    parser.add_argument("-i", "--input_dir", required=True, nargs="+", help="folder(s) that hold test_*/")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--sort", choices=("total", "step"), default="total", help="best first, or by step")
    parser.add_argument("--plot", action="store_true", help="write accuracy.png into (the first of) the folders")
    args = parser.parse_args()
    results, skipped = [], []
    for folder in args.input_dir:
        more_results, more_skipped = read_results(folder)
        results, skipped = results + more_results, skipped + more_skipped
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    if not results:
        print(f"no results in {', '.join(args.input_dir)}", file=sys.stderr)
        return 0
    print(format_tables(results, args.sort, args.format), end="")
    if len({result.benchmark.digest for result in results}) > 1:
        print("results on different questions or releases do not compare: tables are apart", file=sys.stderr)
    if args.plot:
        path = Path(args.input_dir[0]) / "accuracy.png"
        try:
            plot(results, path)
        except ImportError:
            print("--plot needs matplotlib: python -m pip install matplotlib", file=sys.stderr)
            return 1
        print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
