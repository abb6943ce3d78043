"""Read the results of evaluations, and group those that compare with one another.

Scores are computed again from the predictions in `test_*/res_*.json`. Files that cannot be read, or have changed since
they were written, are reported and omitted.
"""

import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dataset.questions import Benchmark, to_benchmark
from dataset.rows import read_json, read_records

from .identity import IncompleteCheckpoint, fingerprint
from .mmau import Scores, evaluate
from .results import digest
from .statistics import confidence_interval

# Keys of a run file that are used here, and their types; all of them may be missing or null.
RUN_FILE = {"label": str, "weights": str, "records": str, "clips": str, "audio": str, "sample_seed": int,
            "allow_missing": bool, "audio_dir": str, "missing": list, "files": dict}  # fmt: skip
# Settings of a result: column of the table -> keys of the run file.
SETTINGS = {"audio": ("audio",), "prompt": ("style", "prompt_digest"), "decoding": ("decoding",), "dtype": ("dtype",),
            "tokens": ("max_new_tokens",), "channels": ("channels",), "match": ("match",)}  # fmt: skip
ASKED = ("records", "clips")  # keys of the run file that are equal for all results of a table, as the questions are


@dataclass
class Result:
    """One model on one benchmark; several runs if it was sampled with several seeds."""

    label: str  # step, or a name
    folder: str  # that holds test_LABEL
    row: str  # the label, after its folder if there are several
    benchmark: Benchmark
    run: dict  # content of the run file
    runs: list[Scores]
    records: dict[str, dict]  # question's id -> its row with the answer (of the first run)
    name: str = ""  # `row`, with the settings in which the rows of its table differ

    def __post_init__(self):
        run, self.scores = self.run, self.runs[0]
        self.step = int(self.label) if self.label.isdecimal() else None
        self.seeds = {run.get("sample_seed")}
        self.not_asked = len(run.get("missing") or [])  # questions that could not be asked and count as wrong
        self.right = dict(zip(self.records, self.scores.matches, strict=True))  # question's id -> whether it is right
        texts = {column: [str(run.get(key, "")) for key in keys] for column, keys in SETTINGS.items()}
        self.settings = {column: " ".join(values).strip() for column, values in texts.items()}
        self.is_real = self.settings["audio"] == "real"
        self.asked = (self.benchmark.digest, *(run.get(key) for key in ASKED))
        self.model = (self.folder, self.label, str(run.get("weights")), *self.settings.values())

    @property
    def accuracy(self) -> float:
        """Percent; the mean over the runs."""
        return statistics.fmean(run.accuracy for run in self.runs)

    @property
    def counts(self) -> dict[str, tuple[float, int]]:
        """Task or modality, and `total` -> (right answers, the mean over the runs; questions, at least one)."""
        groups = [next(iter(run.groups.values())) | {"total": (run.right, run.questions)} for run in self.runs]
        asked = {name: questions for name, (_, questions) in groups[0].items() if questions}
        return {name: (statistics.fmean(group[name][0] for group in groups), asked[name]) for name in asked}

    @property
    def interval(self) -> tuple[float, float]:
        return confidence_interval(*self.counts["total"])


def read_results(*folders: str | Path) -> tuple[list[Result], list[str]]:
    """All results below some folders, and a line with the reason for each skipped file or folder. Raises a
    `FileNotFoundError` if a folder does not exist."""
    found: dict[tuple, Result] = {}  # all that must be equal -> runs
    skipped: list[str] = []
    parents = {Path(folder).resolve(): Path(folder) for folder in folders}.values()
    for parent in parents:
        if not parent.is_dir():
            raise FileNotFoundError(f"{parent}: no such folder")
        for folder in sorted(parent.glob("test_*")):
            files = sorted([*folder.glob("res_*.json"), *folder.glob("res_*.jsonl")])  # none if it is a file
            if not files:
                unfinished = any(folder.glob("res_*.partial-*"))
                skipped.append(f"{folder}: {'not finished yet' if unfinished else 'holds no results'}")
            for file in files:
                if any(folder.glob(f"{file.name}.partial-*")):
                    skipped.append(f"the unfinished new run of {file}; the table shows the result of the earlier run")
                try:
                    result = _read_result(file, f"{parent}/" if len(parents) > 1 else "")
                except (ValueError, OSError) as error:
                    skipped.append(str(error) if str(file) in str(error) else f"{file}: {error}")
                    continue
                first = found.setdefault((*result.model, *result.asked, result.run.get("allow_missing")), result)
                if first is not result and first.seeds & result.seeds:  # for example a copy
                    skipped.append(f"{file}: the same run as another one of {first.label}")
                elif first is not result:
                    first.seeds, first.runs = first.seeds | result.seeds, first.runs + result.runs
    return list(found.values()), skipped


def _read_result(file: Path, prefix: str) -> Result:
    benchmark = to_benchmark(read_records(file), file, file.parent)
    if not benchmark.has_answers:
        raise ValueError(f"{file.name} has blank answers, so there is no score; it is the file to submit")
    run = _read_run(file)
    if (run.get("files") or {}).get(file.name, content := digest(file.read_bytes())) != content:
        raise ValueError(f"{file.name} has changed since test_mmau.py wrote it; evaluate it again")
    label, folder = run.get("label") or file.parent.name.removeprefix("test_"), file.parent.parent
    for checkpoint in (folder / f"checkpoint-{label}", folder / label):
        with suppress(IncompleteCheckpoint, OSError):  # not at hand
            if run.get("label") and run.get("weights") not in (None, fingerprint(checkpoint, download=False)):
                raise ValueError(f"{checkpoint} has changed since {file} was written; evaluate it again")
    by_id = {question.id: question.record for question in benchmark.questions}
    return Result(label, str(folder), prefix + label, benchmark, run, [evaluate(list(by_id.values()))], by_id)


def _read_run(file: Path) -> dict:
    """The run file of a file of predictions, or what the file's name says if there is none (another program's).
    Raises a `ValueError` if it is not a run file."""
    name = file.stem.removeprefix("res_")
    path = file.with_name(f"run_{name}.json")
    try:
        run = read_json(path, "evaluate again")
    except (OSError, ValueError):
        audio = next((audio for audio in ("silent", "shuffled") if audio in name), "real")
        return {"audio": audio, "weights": name.replace(f"_{audio}", "")}
    if not isinstance(run, dict):
        raise ValueError(f"{file}: {path.name} is no run file; evaluate again")
    if odd := [key for key, kind in RUN_FILE.items() if not isinstance(run.get(key), kind | None)]:
        raise ValueError(f"{file}: `{odd[0]}` in {path.name} is {run[odd[0]]!r:.80}; evaluate again")
    return run | {"audio": run.get("audio") or "real"}


def build_tables(results: list[Result], sort: str = "total") -> list[tuple[str, list[Result]]]:
    """Title and rows of each table: results on the same questions, rows and clips, best first or by step."""
    ranked = sorted(results, key=lambda result: (result.step is None, result.step or 0, result.row))
    if sort == "total":
        ranked.sort(key=lambda result: -result.accuracy)  # equal ones stay by step
    tables = {result.asked: [other for other in ranked if other.asked == result.asked] for result in results}
    titled = []
    for asked, rows in tables.items():
        for result in rows:
            variant = ", ".join(result.settings[column] for column in differing(rows))
            result.name = f"{result.row} ({variant})" if variant else result.row
        notes = [f", {key} {asked[i] or 'not recorded'}" for i, key in enumerate(ASKED, start=1)
                 if len({other[i] for other in tables if other[0] == asked[0]}) > 1]  # fmt: skip
        titled.append((rows[0].benchmark.title + "".join(notes), rows))
    return titled


def differing(results: list[Result]) -> list[str]:
    """Settings in which these results differ."""
    return [column for column in SETTINGS if len({result.settings[column] for result in results}) > 1]
