"""Build a run's report: settings, curves, accuracies, every question with every checkpoint's answer, and samples of the
rollouts in training; as one HTML file that loads nothing else (its Content-Security-Policy forbids it).

Models and data may contain any text: `clean` makes it displayable, and Jinja escapes it. The template is `report.html`,
with `report.css` and `report.js`.
"""

import base64
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import soundfile
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dataset.audio import SAMPLE_RATE, load_audio
from dataset.encode import WINDOW_SECONDS
from dataset.questions import check_inside, to_question
from dataset.rows import read_json
from evaluation.collect import SETTINGS, Result, build_tables, read_results
from evaluation.mmau import CUT_OFF, get_prediction
from evaluation.statistics import compare
from run.checkpoints import RECORD
from run.curves import plot_curves, read_history

from .paper import PAPER, PAPER_ROW
from .show_acc import to_table
from .text import printable

HERE = Path(__file__).parent
SHOWN = 4000  # characters of a text
STEPS, COMPLETIONS = 20, 8  # steps of training that are shown, and completions of each
VERSION = re.compile(r"(?m)^- ([A-Z]\w+): (\S+)$")  # of a library, in the model card


def build_report(run: Path, audio_dir: Path | None, clips: int, place: Path, allow_outside: bool = False) -> str:
    """The report's HTML. Raises a `FileNotFoundError` if the folder does not exist, and a `ValueError` if it is empty.

    Args:
        run: output folder of a training, of evaluations, or of both.
        audio_dir: folder that the clips' paths are relative to; None: what each result recorded, below the current
            folder, since results from elsewhere may name any file.
        clips: number of questions whose clip is embedded.
        place: folder of the report; clips are linked from there.
        allow_outside: also embed and link clips outside `audio_dir`.
    """
    results, notes = read_results(run)
    name, settings, samples = run.resolve().name, read_settings(run), read_completions(run, notes)
    curves = _draw(lambda path: plot_curves({name: (run, read_history(run))}, path), notes)
    if not (results or settings or samples or curves):
        raise ValueError(f"{run}: holds no results, logged figures or completions; pass the OUT_DIR of a run")
    # Models without a step come first, as they do in a training.
    tables = [(title, sorted(rows, key=lambda result: result.step is not None))
              for title, rows in build_tables(results, sort="step")]  # fmt: skip
    sets = [_to_set(title, rows, audio_dir) for title, rows in tables]
    inside = None if allow_outside else audio_dir or Path.cwd()
    add_clips([question for asked in sets for question in asked["questions"]], clips, place, inside)
    page = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    page.filters["clean"] = clean
    style, script = (Markup((HERE / file).read_text(encoding="utf-8")) for file in ("report.css", "report.js"))
    card = run / "README.md"  # the model card that TRL writes
    versions = VERSION.findall(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else []
    # No `</script>` or `<!--` in the data can end their element.
    data = Markup(json.dumps({"sets": sets}, allow_nan=False).replace("<", "\\u003c"))
    return page.get_template("report.html").render(
        name=name, notes=notes, versions=dict(versions), settings=settings, curves=curves, samples=samples,
        tables=[_to_page(*table) | {"number": number} for number, table in enumerate(tables)],
        data=data, style=style, script=script, hashes={"style": _csp_hash(style), "script": _csp_hash(script)},
    )  # fmt: skip


def clean(text: object) -> str:
    """A text of a model or of data, made printable, and shortened to `SHOWN` characters with a note of its length."""
    text = str(text)
    rest = f" … ({len(text):,} characters in all)" if len(text) > SHOWN else ""
    return printable(text[:SHOWN]) + rest


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _to_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _draw(draw: Callable[[Path], None], notes: list[str]) -> str:
    """A picture as a data URI, or "" with a note if there is nothing to draw."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            draw(path := Path(folder) / "picture.svg")
            return _to_uri("image/svg+xml", path.read_bytes())
        except (ValueError, FileNotFoundError) as error:
            notes.append(f"no picture: {error}")
            return ""


def read_settings(run: Path) -> dict[str, object]:
    """The training's settings from the newest checkpoint that records them, without access tokens and dictionaries,
    which may hold some."""
    for path in sorted(run.glob(f"checkpoint-*/{RECORD}"), key=os.path.getmtime, reverse=True):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # damaged: an older one is read
            settings = sorted(read_json(path, "an older one is read")["settings"].items())
            return {key: value for key, value in settings
                    if isinstance(value, (str, int, float, list)) and not key.endswith("token")}  # fmt: skip
    return {}


def read_completions(run: Path, notes: list[str]) -> list[dict]:
    """One group of completions with rewards and advantages for each of some evenly spaced logged steps."""
    paths, samples = sorted((run / "completions").glob("completions_*.parquet")), []
    for index in np.unique(np.linspace(0, len(paths) - 1, min(STEPS, len(paths))).round().astype(int)):
        try:
            table = pd.read_parquet(paths[index])
            group = table[table["prompt"].astype(str) == str(table["prompt"].iloc[0])].head(COMPLETIONS)
            numbers = group.select_dtypes("number").drop(columns="step")
            rows = [(text, [f"{value:.3g}" for value in values])
                    for text, values in zip(group["completion"], numbers.to_numpy(), strict=True)]  # fmt: skip
            step, prompt = int(group["step"].iloc[0]), group["prompt"].iloc[0]
            samples.append({"step": step, "prompt": prompt, "columns": list(numbers), "rows": rows})
        except (OSError, ValueError, LookupError, TypeError) as error:
            notes.append(f"{paths[index]}: not read ({error})")
    return samples


def _to_page(title: str, results: list[Result]) -> dict:
    """The template's variables for one table of accuracies."""
    paper = []
    for row in PAPER_ROW.finditer(PAPER.read_text(encoding="utf-8")) if results[0].benchmark.is_original else ():
        cells = [f"the paper's: {row['name']}", *map(str.strip, row["cells"].split("|")[2:5]), row["average"]]
        paper.append(dict(zip(("step", "sound", "music", "speech", "total"), cells, strict=True)))
    groups = {kind: {name: [_share(result, kind, name) for result in results]
                     for name, (_, asked) in names.items() if asked}
              for kind, names in results[0].scores.groups.items()}  # fmt: skip
    single = [(number, result.right) for number, result in enumerate(results) if len(result.runs) == 1]
    pairs = [(a, b, compare(first, second)) for (a, first), (b, second) in itertools.combinations(single, 2)]
    how = {column: sorted({result.settings[column] for result in results} - {""}) for column in SETTINGS}
    table = to_table(results)
    return {
        "title": title, "how": {key: ", ".join(values) for key, values in how.items() if values},
        "columns": list(table), "rows": table.to_dict("records") + paper, "groups": groups, "pairs": pairs,
        "names": [result.name for result in results],
    }  # fmt: skip


def _share(result: Result, kind: str, name: str) -> str:
    """Accuracy in a group of questions, the mean over the runs, with the number of questions."""
    right, asked = zip(*(run.groups[kind].get(name, (0, 0)) for run in result.runs), strict=True)
    return f"{100 * sum(right) / sum(asked):.2f} ({asked[0]})" if sum(asked) else "-"


def _to_set(title: str, results: list[Result], audio_dir: Path | None) -> dict:
    """The script's data for one table's questions; an answer is [text, right, whole completion or "", cut off]."""
    questions, ids = [], dict[str, int]()
    clips = audio_dir or Path(results[0].folder, results[0].run.get("audio_dir") or os.path.abspath("data/MMAU"))
    task, *more = (kind.lower() for kind in results[0].scores.groups)
    for number, (id_, record) in enumerate(results[0].records.items(), start=1):
        answers = []
        for right, answered in ((result.right[id_], result.records[id_]) for result in results):
            answer, whole = get_prediction(answered), str(answered.get("model_completion") or "")
            shown = clean(whole) if whole != answer else ""
            answers.append([clean(answer), right, shown, bool(answered.get(CUT_OFF))])
        questions.append({
            "number": number, "id": clean(id_), "task": clean(record.get(task, "")),
            "kind": clean(", ".join(str(record[key]) for key in more if record.get(key))),
            "question": clean(record["question"]), "choices": [clean(choice) for choice in record["choices"]],
            "answer": clean(record["answer"]), "answers": answers,
            "clip": to_question(record, number, clips, ids).audio_path, "note": "",
        })  # fmt: skip
    return {"title": title, "names": [clean(result.name) for result in results], "questions": questions}


def add_clips(questions: list[dict], count: int, place: Path, inside: Path | None) -> None:
    """Replace each question's `clip`, a path, by the clip itself for `count` of the questions and by a link for the
    others; by nothing, with a `note`, if the clip is missing or outside the folder `inside`. Questions on which models
    differ come first, then those that all got wrong. An embedded clip is 16 kHz, mono, 30 s at most."""

    def interest(question: dict) -> int:
        rights = {answer[1] for answer in question["answers"]}
        return (rights == {False}) + 2 * (rights == {True})

    for question in sorted(questions, key=interest):
        path, question["clip"] = question["clip"], ""
        try:
            if inside is not None:
                check_inside(path, inside)
            if not os.path.isfile(path):
                raise ValueError(f"{path}: no such clip; --audio_dir is the folder of the paths")
            question["clip"] = "./" + quote(os.path.relpath(path, place))  # quotes also the `:` of a scheme
            if count > 0:
                samples, file = load_audio(path)[: WINDOW_SECONDS * SAMPLE_RATE], io.BytesIO()  # the model's input
                soundfile.write(file, samples, SAMPLE_RATE, "VORBIS", format="OGG")
                question["clip"], count = _to_uri("audio/ogg", file.getvalue()), count - 1
        except (ValueError, OSError) as error:
            question["note"] = clean(error)
