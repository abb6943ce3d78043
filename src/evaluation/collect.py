"""Results of evaluations, read back from disk: which compare with one another, and in which settings they differ.

Scores are computed again from the predictions in `test_*/res_*.json`. Files that cannot be read, or have changed since
they were written, are reported and omitted.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from dataset.questions import Benchmark, to_benchmark
from dataset.rows import read_json, read_records

from .mmau import Scores, evaluate
from .results import digest
from .statistics import confidence_interval

# Types of the run file's values that are used here; all of them may be missing or null.
RUN_FILE = {
    "label": str, "weights": str, "records": str, "clips": str, "audio": str, "sample_seed": int, "allow_missing": bool,
    "missing": list, "files": dict,
}  # fmt: skip
# Settings of a result: column of the table -> keys of the run file.
SETTINGS = {
    "prompt": ("style", "prompt_digest"),
    "decoding": ("decoding",),
    "dtype": ("dtype",),
    "tokens": ("max_new_tokens",),
    "channels": ("channels",),
    "match": ("match",),
}


@dataclass
class Result:
    """One model on one benchmark; several runs of it if it was sampled with several seeds."""

    label: str  # step, or a name
    folder: str  # that holds it
    benchmark: Benchmark
    settings: dict[str, str]  # see `SETTINGS`
    runs: list[Scores]
    seeds: set[int | None]  # of the runs; None if greedy
    records: dict[str, dict]  # question's id -> its row with the answer (of the first run)
    weights: str = ""  # fingerprint
    not_asked: int = 0  # questions that could not be, and count as wrong
    prefix: str = ""  # of its name, where there are results of several folders
    variant: str = ""  # of the settings, those in which the rows of its table differ
    drops: dict[str, float] = field(default_factory=dict)  # `silent`, `shuffled` -> total accuracy in %

    @property
    def step(self) -> int | None:
        return int(self.label) if self.label.isdecimal() else None

    @property
    def row(self) -> str:
        return self.prefix + self.label

    @property
    def name(self) -> str:
        return f"{self.row} ({self.variant})" if self.variant else self.row

    @property
    def scores(self) -> Scores:
        return self.runs[0]

    @property
    def accuracy(self) -> float:
        """Percent; the mean over the runs."""
        return statistics.fmean(run.accuracy for run in self.runs)

    @property
    def tasks(self) -> dict[str, tuple[float, int]]:
        """Task or modality -> (right, the mean over the runs; questions), those that have questions."""
        groups = [next(iter(run.groups.values())) for run in self.runs]
        asked = {name: questions for name, (_, questions) in groups[0].items() if questions}
        return {name: (statistics.fmean(group[name][0] for group in groups), asked[name]) for name in asked}

    @property
    def counts(self) -> dict[str, tuple[float, int]]:
        questions = self.scores.questions
        return self.tasks | {"total": (self.accuracy * questions / 100, questions)}

    @property
    def interval(self) -> tuple[float, float]:
        return confidence_interval(*self.counts["total"])

    @property
    def right(self) -> dict[str, bool]:
        """Question's id -> whether the (first run's) answer is right."""
        return dict(zip(self.records, self.scores.matches, strict=True))


def read_results(*folders: str | Path) -> tuple[list[Result], list[str]]:
    """All results below some folders.

    Returns:
        The results, and for each skipped file or folder one line with the reason.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    found: dict[tuple, Result] = {}  # by what tells a row from others, and the audio
    skipped: list[str] = []
    places = {Path(folder).resolve(): Path(folder) for folder in folders}.values()
    for folder in places:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        for path in sorted(folder.glob("test_*")):
            files = sorted([*path.glob("res_*.json"), *path.glob("res_*.jsonl")])  # none if the path is a file
            if not files:
                unfinished = any(path.glob("res_*.partial-*"))
                skipped.append(f"{path}: {'not finished yet' if unfinished else 'holds no results'}")
            for file in files:
                if any(path.glob(f"{file.name}.partial-*")):
                    skipped.append(f"nothing of {file}, but it is being evaluated again: the row is the run before")
                try:
                    result, key, audio = _read_result(file, folder, f"{folder}/" if len(places) > 1 else "")
                    first = found.setdefault((key, audio), result)
                    if first is not result and first.seeds.isdisjoint(result.seeds):
                        first.seeds |= result.seeds
                        first.runs += result.runs
                    elif first is not result:  # a copy, say
                        skipped.append(f"{file}: the same run as another one of {first.label}")
                except (ValueError, OSError) as error:
                    skipped.append(str(error) if str(file) in str(error) else f"{file}: {error}")
    for (key, audio), result in found.items():
        heard = found.get((key, "real"))
        if not heard:
            place = f"{result.folder}/test_{result.label}"
            skipped.append(f"{place}: {audio} audio, but no real one with the same weights and settings to compare to")
        elif heard is not result:
            heard.drops[audio] = result.accuracy
    return [result for (_, audio), result in found.items() if audio == "real"], skipped


def _read_result(file: Path, folder: Path, prefix: str) -> tuple[Result, tuple, str]:
    """One file of predictions; its identity, apart from a sample's seed; its audio: `real`, `silent` or `shuffled`."""
    records = read_records(file)
    benchmark = to_benchmark(records, file, file.parent)
    if not benchmark.has_answers:
        raise ValueError(f"{file.name} has blank answers, so there is no score; it is the file to submit")
    scores = evaluate(records)
    run = _read_run(file)
    found = digest(file.read_bytes())
    if (run.get("files") or {}).get(file.name, found) != found:
        raise ValueError(f"{file.name} has changed since test_mmau.py wrote it; evaluate it again")
    label = run.get("label") or file.parent.name.removeprefix("test_")
    settings = {column: " ".join(str(run.get(key, "")) for key in keys).strip() for column, keys in SETTINGS.items()}
    seed, missing = run.get("sample_seed"), len(run.get("missing") or [])
    by_id = {question.id: question.record for question in benchmark.questions}
    weights = str(run.get("weights"))
    result = Result(label, str(folder), benchmark, settings, [scores], {seed}, by_id, weights, missing, prefix)
    decides = ("weights", "records", "clips", "allow_missing")
    key = (str(folder), label, benchmark.digest, *(run.get(key) for key in decides), *settings.values())
    return result, key, run.get("audio") or "real"


def _read_run(file: Path) -> dict:
    """The run file of a file of predictions; without one, as for another program's predictions, what the name tells.

    Raises:
        ValueError: it is not a run file of test_mmau.py.
    """
    name = file.stem.removeprefix("res_")
    path = file.with_name(f"run_{name}.json")
    try:
        run = read_json(path, "evaluate again")
    except (OSError, ValueError):
        audio = next((audio for audio in ("silent", "shuffled") if audio in name), "real")
        return {"audio": audio, "weights": name.replace(f"_{audio}", "")}
    if not isinstance(run, dict):
        raise ValueError(f"{file}: {path.name} is a JSON {type(run).__name__}, not a run file; evaluate again")
    for key, kind in RUN_FILE.items():
        if run.get(key) is not None and not isinstance(run[key], kind):
            raise ValueError(
                f"{file}: `{key}` in {path.name} is {run[key]!r:.80}, not a {kind.__name__}; evaluate again"
            )
    return run


def build_tables(results: list[Result], sort: str = "total") -> list[tuple[Benchmark, list[Result]]]:
    """Results that compare with one another, together; within a table best first, or by step."""
    tables: dict[str, list[Result]] = {result.benchmark.digest: [] for result in results}
    ranked = sorted(results, key=lambda result: (result.step is None, result.step or 0, result.row))
    if sort == "total":
        ranked.sort(key=lambda result: -result.accuracy)  # equal ones stay by step
    for result in ranked:
        tables[result.benchmark.digest].append(result)
    for rows in tables.values():
        for result in rows:
            result.variant = ", ".join(result.settings[column] for column in differing(rows))
    return [(rows[0].benchmark, rows) for rows in tables.values()]


def join_tables(tables: list[tuple[Benchmark, list[Result]]]) -> list[list[Result | None]]:
    """A row for each model with its settings, in the order of the first table; a cell for each table, None where this
    model was not asked these questions."""
    rows: dict[tuple, list[Result | None]] = {}
    for column, (_, results) in enumerate(tables):
        for result in results:
            key = (result.folder, result.label, result.weights, *result.settings.values())
            rows.setdefault(key, [None] * len(tables))[column] = result
    return list(rows.values())


def differing(results: list[Result]) -> list[str]:
    """Settings in which these results differ."""
    return [column for column in SETTINGS if len({result.settings[column] for result in results}) > 1]


def list_tasks(results: list[Result]) -> list[str]:
    """Tasks of these results, in the order of MMAU's script."""
    return list(dict.fromkeys(task for result in results for task in result.tasks))
