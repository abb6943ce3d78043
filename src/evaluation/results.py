"""What an evaluation run is, and its files. For the questions of MMAU's test-mini and a model labelled 300:

    test_300/res_mmau_mini.json     the questions with `model_prediction` (and `model_output`, the same)
    test_300/eval_mmau_mini.txt     the official scores; none where the answers are blank
    test_300/run_mmau_mini.json     what was evaluated, how, and what the two other files hash to: `Run`
    test_300/res_mmau_mini.json.partial-*   answers as they come, one file a process; a killed run goes on from there

Settings other than the defaults are part of the names: `res_mmau_mini_sample-7_tokens-64.json`. Leaves out how the
answers are found (`answers.py`) and scored (`mmau.py`).
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dataset.prompt import DEFAULT_STYLE, build_question, extract_answer
from dataset.questions import Benchmark
from dataset.rows import read_json, write_whole

from .mmau import CUT_OFF, MATCH_RULE, evaluate

MAX_NEW_TOKENS = 256  # as in the original


class Completion(NamedTuple):
    """What a model wrote."""

    text: str
    cut_off: bool  # by the token limit


@dataclass(frozen=True, kw_only=True)
class Run:
    """What decides the files of a run: two runs with equal descriptions end in the same ones.

    The first seven fields are filled in by a sweep, for each model.
    """

    label: str = ""  # of the model, in the table
    weights: str = ""  # fingerprint of the checkpoint
    benchmark: str = ""
    release: str = ""
    questions: str = ""  # digest of what is asked: results compare where it is equal
    records: str = ""  # digest of the rows with all they hold, in their order
    clips: str = ""  # digest of the clips' bytes; a missing one counts as such
    dtype: str = "float32"  # of the weights
    style: str | None = None  # of the prompts; a sweep takes None for each checkpoint's own
    audio: str = "real"  # or `silent`: zeros of the clip's length; or `shuffled`: another question's clip
    channels: str = "first"  # see `load_audio`
    max_new_tokens: int = MAX_NEW_TOKENS
    sample_seed: int | None = None  # greedy if None
    allow_missing: bool = False  # whether questions that cannot be asked count as wrong
    batch_size: int = 1  # questions at once
    engine: str = "built-in"  # or `vllm`, whose rounding depends on what it answers side by side

    def describe(self) -> dict:
        """As it stands in the run file, the engine in `decoding`. The batch size changes nothing that is exact."""
        left_out = {"engine"} | ({"batch_size"} if (self.engine, self.dtype) == ("built-in", "float32") else set())
        described = {key: value for key, value in vars(self).items() if key not in left_out}
        prompt = build_question("QUESTION", ["CHOICE", "CHOICE"], self.style or DEFAULT_STYLE)
        described |= {"prompt": prompt, "prompt_digest": digest(prompt.encode())[:8]}
        by = "" if self.engine == "built-in" else f" by {self.engine} (not byte-exact)"
        decoding = ("greedy" if self.sample_seed is None else "sampled") + by
        return described | {"decoding": decoding, "match": MATCH_RULE}

    def name(self, usual_style: str, usual_dtype: str) -> str:
        """Of the files: the benchmark, and whatever is not as usual."""
        other = {
            self.audio: self.audio != "real",
            f"sample-{self.sample_seed}": self.sample_seed is not None,
            str(self.style): self.style != usual_style,
            f"tokens-{self.max_new_tokens}": self.max_new_tokens != MAX_NEW_TOKENS,
            self.dtype: self.dtype != usual_dtype,
            f"channels-{self.channels}": self.channels != "first",
            "allow_missing": self.allow_missing,
            self.engine: self.engine != "built-in",
        }
        return "_".join([self.benchmark, *(part for part, differs in other.items() if differs)])


def digest(data: bytes) -> str:
    """16 hex digits that tell data apart."""
    return hashlib.sha256(data).hexdigest()[:16]


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

    @property
    def lock(self) -> Path:
        return self.results.with_name(f"{self.results.name}.lock")

    def partial(self, process: int | str) -> Path:
        """Where a process leaves its answers until all are there."""
        return self.results.with_name(f"{self.results.name}.partial-{process}")

    def partials(self) -> list[Path]:
        return [path for path in sorted(self.results.parent.iterdir()) if path.name.startswith(self.partial("").name)]

    def _beside(self, kind: str, suffix: str) -> Path:
        return self.results.with_name(f"{kind}_{self.results.stem.removeprefix('res_')}{suffix}")

    def _digests(self) -> dict[str, str | None]:
        """Names of the files of results -> what they hash to; None without such a file."""
        return {
            path.name: digest(path.read_bytes()) if path.is_file() else None for path in (self.results, self.scores)
        }

    def find_differences(self, run: Run) -> list[str] | None:
        """In what the finished run whose results are there differs from `run`, a changed or missing file of results
        included; None where nothing is there.

        The label is a name, and of the batch size only the fact counts that it might have changed rounding.
        """
        if not self.run.is_file() and not self.results.is_file():
            return None
        try:
            found = read_json(self.run, "evaluate again")
            files = dict(found["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return [self.run.name]
        asked = run.describe()
        settings = sorted(key for key in asked if key not in ("label", "batch_size") and found.get(key) != asked[key])
        return settings + [name for name, content in self._digests().items() if files.get(name) != content]

    def resume(self, run: Run, force: bool = False) -> dict[str, Completion]:
        """{id: completion} of a run that did not end, now in one partial file; what is of other runs is dropped, with
        `force` all there is. A `ValueError` says where the results could not be written in the end."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.results, self.scores, self.run):
            if path.is_dir():
                raise ValueError(f"{path}: is a folder; a file of results gets this name")
        done = {} if force else self._read_partials(run)
        write_whole(self.partial(0), _to_lines([run.describe(), *_to_rows(done)]))
        for path in self.partials():
            if path != self.partial(0):
                path.unlink()
        return done

    def _read_partials(self, run: Run) -> dict[str, Completion]:
        """{id: completion} of all partial files of this very run; a damaged one is named, and asked again."""
        done: dict[str, Completion] = {}
        for path in self.partials():
            # The last line was cut off, or is empty.
            *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
            try:
                if lines and lines[0] == json.dumps(run.describe()):
                    done |= {
                        str(id_): Completion(str(text), bool(cut)) for id_, text, cut in map(json.loads, lines[1:])
                    }
                elif lines:
                    print(f"{path}: is of another run, dropped", file=sys.stderr, flush=True)
            except (ValueError, TypeError, RecursionError) as error:
                print(f"{path}: is damaged ({error}), dropped", file=sys.stderr, flush=True)
        return done

    @contextmanager
    def open_partial(self, run: Run, process: int) -> Iterator[Callable[[dict[str, Completion]], None]]:
        """A function that appends a batch's {id: completion} to a process's partial file, at once and as a whole."""
        path = self.partial(process)
        if not path.exists():
            write_whole(path, _to_lines([run.describe()]))
        with open(path, "a", encoding="utf-8") as file:

            def write(completions: dict[str, Completion]) -> None:
                file.write(_to_lines(_to_rows(completions)))
                file.flush()
                os.fsync(file.fileno())

            yield write

    def finish(self, run: Run, benchmark: Benchmark, missing: list[str], cut: int) -> str:
        """Partial files -> results of a whole run, `run_*.json` the last: where it is, all is there.

        Args:
            missing: ids of the questions that could not be asked.
            cut: how many clips were too long.

        Returns:
            What came out, in a line.
        """
        records = to_records(benchmark, self._read_partials(run) | dict.fromkeys(missing, Completion("", False)))
        self.run.unlink(missing_ok=True)  # of another run
        described = run.describe() | {"missing": missing, "cut": cut}
        if benchmark.has_answers:
            scores = evaluate(records)
            described |= {"no_choice": scores.no_choice, "several": scores.several, "cut_off": scores.cut_off}
            write_whole(self.scores, str(scores))
            outcome = f"{scores.accuracy:.2f}% of {scores.questions} questions, {self.results}"
        else:
            self.scores.unlink(missing_ok=True)
            outcome = f"{self.results}: written, ready to submit (the answers are blank, so there is no score)"
        in_lines = self.results.suffix == ".jsonl"
        write_whole(self.results, _to_lines(records) if in_lines else json.dumps(records, indent=2) + "\n")
        write_whole(self.run, json.dumps(described | {"files": self._digests()}, indent=2) + "\n")
        for path in self.partials():
            path.unlink()
        return outcome


def to_records(benchmark: Benchmark, completions: dict[str, Completion]) -> list[dict]:
    """The benchmark's rows with their answers, under every key that the benchmarks' scripts and READMEs name.

    Args:
        completions: of every question, by its id.
    """
    records = []
    for question in benchmark.questions:
        completion = completions[question.id]
        answer = extract_answer(completion.text)
        record = question.record | {"model_prediction": answer, "model_output": answer}
        record |= {"answer_prediction": answer} if benchmark.name == "mmar" else {"release": benchmark.release}
        records.append(record | {"model_completion": completion.text, CUT_OFF: completion.cut_off})
    return records


def _to_rows(completions: dict[str, Completion]) -> Iterator[list]:
    """As they stand in a partial file."""
    return ([id_, *completion] for id_, completion in completions.items())


def _to_lines(rows: Iterable) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)
