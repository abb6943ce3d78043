"""What an evaluation run is, and its files. For the questions of MMAU's test-mini and a model labelled 300:

    test_300/res_mmau_mini.json     the questions with `model_prediction` (and `model_output`, the same)
    test_300/eval_mmau_mini.txt     the official scores; none where the answers are blank
    test_300/run_mmau_mini.json     what was evaluated, and how: `Run`
    test_300/res_mmau_mini.json.partial-*   answers as they come, one file a process; a killed run goes on from there

Leaves out how the answers are found (`answers.py`) and scored (`mmau.py`).
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dataset.prompt import extract_answer
from dataset.questions import Benchmark
from dataset.rows import write_whole

from .mmau import evaluate


@dataclass(frozen=True, kw_only=True)
class Run:
    """What decides the answers: two runs with equal descriptions end in the same files.

    The first five fields, which a sweep fills in for each model, only tell runs apart.
    """

    label: str = ""  # of the model, in the table
    weights: str = ""  # fingerprint
    benchmark: str = ""
    release: str = ""
    questions: str = ""  # digest
    dtype: str = "float32"  # of the weights
    style: str | None = None  # of the prompts; a sweep takes None for each checkpoint's own
    audio: str = "real"  # or `silent`: zeros of the clip's length; or `shuffled`: another question's clip
    channels: str = "first"  # see `load_audio`
    max_new_tokens: int
    sample_seed: int | None = None  # greedy if None
    batch_size: int = 1  # questions at once

    def describe(self) -> dict:
        """As it stands in the run file. In float32 the batch size changes nothing."""
        return {key: value for key, value in vars(self).items() if key != "batch_size" or self.dtype != "float32"}


@dataclass(frozen=True)
class ResultFiles:
    """The files of one run, all beside `res_*.json`."""

    results: Path  # .json, or .jsonl where the questions came so: what the benchmark's own script reads

    @property
    def run(self) -> Path:
        return self._beside("run", ".json")

    @property
    def scores(self) -> Path:
        return self._beside("eval", ".txt")

    def partial(self, process: int | str) -> Path:
        """Where a process leaves its answers until all are there."""
        return self.results.with_name(f"{self.results.name}.partial-{process}")

    def partials(self) -> list[Path]:
        return [path for path in sorted(self.results.parent.iterdir()) if path.name.startswith(self.partial("").name)]

    def _beside(self, kind: str, suffix: str) -> Path:
        return self.results.with_name(f"{kind}_{self.results.stem.removeprefix('res_')}{suffix}")

    def find_differences(self, run: Run) -> list[str] | None:
        """In what the finished run whose results are there differs from `run`; None where there are no results.

        The label is a name, and of the batch size only the fact counts that it might have changed rounding.
        """
        if not self.results.is_file():
            return None
        try:
            found = json.loads(self.run.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        asked = run.describe()
        return sorted(key for key in asked if key not in ("label", "batch_size") and found.get(key) != asked[key])

    def resume(self, run: Run) -> dict[str, str]:
        """{id: completion} of a run that did not end, now in one partial file; what is of other runs is dropped."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        done = self._read_partials(run)
        write_whole(self.partial(0), _to_lines([run.describe(), *map(list, done.items())]))
        for path in self.partials():
            if path != self.partial(0):
                path.unlink()
        return done

    def _read_partials(self, run: Run) -> dict[str, str]:
        """{id: completion} of all partial files of this very run."""
        done = {}
        for path in self.partials():
            # The last line was cut off, or is empty.
            *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
            if lines and lines[0] == json.dumps(run.describe()):
                done |= dict(json.loads(line) for line in lines[1:])
            elif lines:
                print(f"{path}: is of another run, dropped", file=sys.stderr, flush=True)
        return done

    @contextmanager
    def open_partial(self, run: Run, process: int) -> Iterator[Callable[[dict[str, str]], None]]:
        """A function that appends a batch's {id: completion} to a process's partial file, at once and as a whole."""
        path = self.partial(process)
        if not path.exists():
            write_whole(path, _to_lines([run.describe()]))
        with open(path, "a", encoding="utf-8") as file:

            def write(completions: dict[str, str]) -> None:
                file.write(_to_lines(map(list, completions.items())))
                file.flush()
                os.fsync(file.fileno())

            yield write

    def finish(self, run: Run, benchmark: Benchmark, missing: list[str], cut: int) -> str:
        """Partial files -> results of a whole run, the predictions last: where they are, all is there.

        Args:
            missing: ids of the questions that could not be asked.
            cut: how many clips were too long.

        Returns:
            What came out, in a line.
        """
        records = to_records(benchmark, self._read_partials(run) | dict.fromkeys(missing, ""))
        self.results.unlink(missing_ok=True)  # of another run
        if benchmark.has_answers:
            scores = evaluate(records)
            write_whole(self.scores, str(scores))
            outcome = f"{scores.accuracy:.2f}% of {scores.questions} questions, {self.results}"
        else:
            self.scores.unlink(missing_ok=True)
            outcome = f"the answers are blank, so there is no score; {self.results} is the file to submit"
        write_whole(self.run, json.dumps(run.describe() | {"missing": missing, "cut": cut}, indent=2) + "\n")
        in_lines = self.results.suffix == ".jsonl"
        write_whole(self.results, _to_lines(records) if in_lines else json.dumps(records, indent=2) + "\n")
        for path in self.partials():
            path.unlink()
        return outcome


def to_records(benchmark: Benchmark, completions: dict[str, str]) -> list[dict]:
    """The benchmark's rows with their answers, under every key that the benchmarks' scripts and READMEs name.

    Args:
        completions: of every question, by its id.
    """
    records = []
    for question in benchmark.questions:
        completion = completions[question.id]
        answer = extract_answer(completion)
        record = question.record | {"model_prediction": answer, "model_output": answer}
        record |= {"answer_prediction": answer} if benchmark.name == "mmar" else {"release": benchmark.release}
        records.append(record | {"model_completion": completion})
    return records


def _to_lines(rows: Iterable) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)
