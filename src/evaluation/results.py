"""What decides the results of an evaluation, and its files. For MMAU's test-mini and a model labelled 300:

    test_300/res_mmau_mini.json     the questions with `model_prediction` (and `model_output`, the same)
    test_300/eval_mmau_mini.txt     the official scores; not written if the answers are blank
    test_300/run_mmau_mini.json     what was evaluated, the `Settings`, and the digests of the two other files
    test_300/res_mmau_mini.json.partial-*   answers so far, one file per process; a killed run continues from them

Settings other than the defaults are part of the names: `res_mmau_mini_sample-7_tokens-64.json`.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import NamedTuple

from dataset.prompt import DEFAULT_STYLE, build_question, extract_answer
from dataset.questions import Benchmark
from dataset.rows import read_json

from .files import write_whole
from .mmau import CUT_OFF, MATCH_RULE, evaluate

MAX_NEW_TOKENS = 256  # as in the original


class Completion(NamedTuple):
    text: str
    cut_off: bool  # by the token limit


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the user wants the questions to be answered."""

    dtype: str = "float32"  # of the weights
    style: str | None = None  # of the prompts; None in a sweep: each checkpoint's own
    audio: str = "real"  # or `silent`: zeros of the clip's length; or `shuffled`: another question's clip
    channels: str = "first"  # see `load_audio`
    max_new_tokens: int = MAX_NEW_TOKENS
    sample_seed: int | None = None  # greedy if None
    allow_missing: bool = False  # count questions that cannot be asked as wrong
    batch_size: int = 1  # questions at once

    def name(self, benchmark: str, usual_style: str, usual_dtype: str) -> str:
        """The stem of the files' names: the benchmark and all settings that are not the usual ones."""
        parts = {
            self.audio: "real", f"sample-{self.sample_seed}": "sample-None", str(self.style): usual_style,
            f"tokens-{self.max_new_tokens}": f"tokens-{MAX_NEW_TOKENS}", self.dtype: usual_dtype,
            f"channels-{self.channels}": "channels-first", "allow_missing" * self.allow_missing: "",
        }  # fmt: skip
        return "_".join([benchmark, *(part for part, usual in parts.items() if part != usual)])


def describe(label: str, weights: str, benchmark: Benchmark, hashes: dict[str, str], settings: Settings) -> dict:
    """The first part of `run_*.json`: all that decides the result of the model with this label (in the table) and
    fingerprint. `hashes` are those of the clips by path; a missing clip counts as such."""
    records = json.dumps([question.record for question in benchmark.questions])
    clips = " ".join(hashes[question.audio_path] for question in benchmark.questions)
    prompt = build_question("QUESTION", ["CHOICE", "CHOICE"], settings.style or DEFAULT_STYLE)
    # In float32 the batch size cannot change an answer.
    chosen = {key: value for key, value in vars(settings).items() if key != "batch_size" or settings.dtype != "float32"}
    return {
        "label": label, "weights": weights, "benchmark": benchmark.name, "release": benchmark.release,
        "questions": benchmark.digest, "records": digest(records), "clips": digest(clips), **chosen,
        "prompt": prompt, "prompt_digest": digest(prompt)[:8],
        "decoding": "greedy" if settings.sample_seed is None else "sampled", "match": MATCH_RULE,
    }  # fmt: skip


def digest(content: str | bytes) -> str:
    """The first 16 hex digits of SHA-256."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


class ResultFiles:
    """The files of one run. `results` is the path of `res_*`: .json, or .jsonl if the questions are in JSONL, as the
    benchmark's own script expects. `described` comes from `describe`."""

    def __init__(self, results: Path, described: dict):
        self.results, self.described = results, described
        name = results.stem.removeprefix("res_")
        self.run, self.scores = results.with_name(f"run_{name}.json"), results.with_name(f"eval_{name}.txt")

    def _partials(self) -> list[Path]:
        return sorted(self.results.parent.glob(f"{escape(self.results.name)}.partial-*"))

    def find_differences(self) -> list[str] | None:
        """Settings in which the finished run on disk differs from this one, and the names of changed or missing files;
        None if nothing is on disk. Another label or batch size alone is no reason to evaluate again."""
        try:
            found = read_json(self.run, "evaluate again")
            files = dict(found["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return [self.run.name] if self.run.is_file() or self.results.is_file() else None
        compared = self.described.keys() - {"label", "batch_size"}
        differing = sorted(key for key in compared if found.get(key) != self.described[key])
        return differing + [name for name, content in self._digests().items() if files.get(name) != content]

    def resume(self, force: bool = False) -> dict[str, Completion]:
        """{id: completion} of an unfinished run, then all in one partial file; nothing with `force`. The other partial
        files are removed."""
        done = {} if force else self._read_partials()
        first = self.results.with_name(f"{self.results.name}.partial-0")
        write_whole(first, self._to_lines(done, header=True))
        for path in set(self._partials()) - {first}:
            path.unlink()
        return done

    def _read_partials(self) -> dict[str, Completion]:
        """{id: completion} of all partial files of this run. Files that cannot be used are reported."""
        done: dict[str, Completion] = {}
        for path in self._partials():
            # The last line is empty or was cut off.
            header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
            try:
                if header != json.dumps(self.described):
                    raise ValueError("it belongs to another run")
                done |= {id_: Completion(text, cut_off) for id_, text, cut_off in map(json.loads, lines)}
            except (ValueError, TypeError) as error:
                print(f"{path}: ignored ({error})", file=sys.stderr, flush=True)
        return done

    def append(self, process: int, completions: dict[str, Completion]) -> None:
        """Append {id: completion} to the partial file of a process, and wait for the disk."""
        with open(self.results.with_name(f"{self.results.name}.partial-{process}"), "a", encoding="utf-8") as file:
            file.write(self._to_lines(completions, header=file.tell() == 0))
            file.flush()
            os.fsync(file.fileno())

    def _to_lines(self, completions: dict[str, Completion], header: bool) -> str:
        return _to_jsonl([self.described] * header + [[id_, *pair] for id_, pair in completions.items()])

    def finish(self, benchmark: Benchmark, missing: list[str], cut: int) -> str:
        """Replace the partial files of a complete run by its results, and return a line about them. `run_*.json` comes
        last: where it is, the run is finished. `missing`: ids of questions that could not be asked. `cut`: number of
        clips that were too long."""
        records = to_records(benchmark, self._read_partials() | dict.fromkeys(missing, Completion("", False)))
        self.run.unlink(missing_ok=True)  # of an earlier run
        audio_dir = os.path.relpath(benchmark.audio_dir, self.results.absolute().parent.parent)  # where test_* lie
        described = self.described | {"missing": missing, "cut": cut, "audio_dir": audio_dir}
        outcome = f"{self.results}: ready to submit (the answers are blank, so there is no score)"
        if benchmark.has_answers:
            scores = evaluate(records)
            described |= {"no_choice": scores.no_choice, "several": scores.several, "cut_off": scores.cut_off}
            write_whole(self.scores, str(scores))
            outcome = f"{scores.accuracy:.2f}% of {scores.questions} questions, {self.results}"
        is_jsonl = self.results.suffix == ".jsonl"
        write_whole(self.results, _to_jsonl(records) if is_jsonl else json.dumps(records, indent=2) + "\n")
        write_whole(self.run, json.dumps(described | {"files": self._digests()}, indent=2) + "\n")
        for path in self._partials():
            path.unlink()
        return outcome

    def _digests(self) -> dict[str, str | None]:
        files = (self.results, self.scores)
        return {file.name: digest(file.read_bytes()) if file.is_file() else None for file in files}


def to_records(benchmark: Benchmark, completions: dict[str, Completion]) -> list[dict]:
    """The benchmark's rows with the answers under all keys that the benchmarks' scripts and READMEs name. `completions`
    has an entry for the id of every question."""
    records = []
    for question in benchmark.questions:
        completion = completions[question.id]
        answer = extract_answer(completion.text)
        record = question.record | {"model_prediction": answer, "model_output": answer}
        record |= {"answer_prediction": answer} if benchmark.name == "mmar" else {"release": benchmark.release}
        records.append(record | {"model_completion": completion.text, CUT_OFF: completion.cut_off})
    return records


def _to_jsonl(rows: Iterable) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)
