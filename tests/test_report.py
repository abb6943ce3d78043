"""report.py: the page is read as a browser would, and (slow) by one."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import soundfile

import report
from browser import Browser
from conftest import ROOT, content_digest
from dataset.questions import RELEASES
from evaluation.collect import read_results
from evaluation.statistics import compare
from test_curves import write_state
from test_show_acc import rows, write_result
from utils.report import SHOWN, add_clips, build_report, clean, read_completions, read_settings

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7*7 }} {% raw %} <!-- \u202egnp\u2066 &lt; ' \" -->"
ENTER, TAB = "\ue007", "\ue004"


class Page(HTMLParser):
    """Elements with their attributes, the texts of scripts and styles, all other text, and the rows of tables."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.raw, self.text, self.rows = [], {"script": [], "style": []}, "", []
        self.cell = False  # whether inside of one
        self.feed(html)
        self.data = json.loads(self.raw["script"][0]) if self.raw["script"] else None

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        tag = self.elements[-1][0] if self.elements else ""
        if tag in self.raw and self.cdata_elem:
            self.raw[tag].append(data)
        else:
            self.text += data
            if self.cell:
                self.rows[-1][-1] += data.strip()


def write_completions(folder: Path, step: int, text: str = "a cat") -> None:
    (folder / "completions").mkdir(exist_ok=True)
    table = {"step": [step] * 3, "prompt": ["What?", "What?", "Who?"], "completion": [text, "a dog", "nobody"]}
    table |= {"accuracy_reward": [0.0, 1.0, 0.5], "advantage": [-1.25, 1.25, 0.0]}
    pd.DataFrame(table).to_parquet(folder / "completions" / f"completions_{step:05d}.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of all there is; clips of 1 s for all questions but the last."""
    folder = tmp_path_factory.mktemp("run")
    questions = rows(30)
    questions[3] |= {"question": EVIL, "audio_id": "a javascript:#?.wav", "sub-category": EVIL}
    for label, right in (("base", 9), ("100", 21)):
        file = write_result(folder, label, right, questions)
        records = json.loads(file.read_text())
        records[3] |= {
            "model_output": EVIL,
            "model_completion": EVIL + "x" * 1_000_000,
            "model_cut_off": True,
        }
        records[4] |= {"model_completion": "<think>It barks.</think><answer>dog</answer>"}
        file.write_text(json.dumps(records))
    (folder / "clips").mkdir()
    for question in questions[:-1]:
        noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
        soundfile.write(folder / "clips" / question["audio_id"], noise, 16_000)
    write_state(folder, 3, kl=0.5)
    write_completions(folder, 10, EVIL + "y" * 10_000)
    return folder


def build(folder: Path, clips: int = 4) -> str:
    return build_report(folder, folder / "clips", clips, folder)


@pytest.fixture(scope="module")
def html(folder) -> str:
    return build(folder)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


@pytest.fixture
def browser():
    browser = Browser()
    yield browser
    browser.close()


def test_what_anybody_wrote_stays_text(html, page):
    assert [tag for tag, _ in page.elements].count("script") == 2 and len(page.raw["script"]) == 2
    assert "alert(1)" in page.text and "{{ 7*7 }}" in page.text, "the completion of the training is shown"
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href", "action", "srcset", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html + json.dumps(page.data, ensure_ascii=False))
    assert "y" * (SHOWN + 1) not in html and "10,1" in page.text and "characters in all" in page.text


def test_the_data_are_those_of_the_results(page):
    asked = page.data["sets"][0]
    assert asked["names"] == ["base", "100"] and [q["id"] for q in asked["questions"]] == [f"{i}" for i in range(30)]
    evil, barks = asked["questions"][3], asked["questions"][4]
    assert evil["question"] == clean(EVIL) and "</script><script>" in evil["question"]
    answer, right, whole, cut_off = evil["answers"][0]
    assert answer == clean(EVIL) and not right and cut_off
    assert len(whole) < SHOWN + 200 and "(1,000,1" in whole
    assert barks["answers"] == [["dog", True, "<think>It barks.</think><answer>dog</answer>", False]] * 2
    assert barks["choices"] == ["dog", "cat"] and barks["answer"] == "dog" and barks["kind"] == "easy, Counting"


def test_control_characters_are_shown_by_their_names():
    assert clean("a\u202eb\x00\n\tשלום") == "a⟨U+202E⟩b⟨U+0000⟩\n\tשלום"
    assert clean("z" * SHOWN) == "z" * SHOWN and clean("z" * 12_345).endswith(" … (12,345 characters in all)")


def test_only_its_own_script_and_style_may_run_and_nothing_may_be_asked_for(page):
    (policy,) = [at["content"] for _, at in page.elements if at.get("http-equiv") == "Content-Security-Policy"]
    policy = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert policy.pop("default-src") == "'none'" and policy.pop("img-src") == "data:"
    assert policy.pop("media-src") == "data: file:"
    for kind, text in (("style", page.raw["style"][0]), ("script", page.raw["script"][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{kind}-src") == f"'sha256-{digest}'"
        assert not re.search(r"url\(|@import|fetch|XMLHttp|import\(|innerHTML|eval", text)
    assert not policy


def test_clips_are_in_the_file_where_checkpoints_differ_and_linked_elsewhere(folder, page):
    questions = page.data["sets"][0]["questions"]
    embedded = [question for question in questions if question["clip"].startswith("data:audio/ogg;base64,")]
    assert [question["id"] for question in embedded] == ["9", "10", "11", "12"]  # 9 to 20 became right
    data = embedded[0]["clip"].partition(",")[2]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert rate == 16_000 and len(samples) == 16_000 and len(data) < 32_000 and 0.05 < samples.std() < 0.2
    for question in questions[:9] + questions[13:-1]:
        assert question["clip"].startswith("./") and ":" not in question["clip"]
        assert (folder / unquote(question["clip"])).is_file()
    assert questions[-1]["clip"] == "" and "--audio_dir" in questions[-1]["note"]


def test_a_clip_that_does_not_decode_is_linked_and_the_next_one_embedded(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF, but no more")
    soundfile.write(tmp_path / "b.wav", np.sin(np.arange(40 * 16_000)), 16_000)
    questions = [{"clip": str(tmp_path / name), "answers": [["", True]], "note": ""} for name in ("a.wav", "b.wav")]
    add_clips(questions, 1, tmp_path, tmp_path)
    assert questions[0]["clip"] == "./a.wav" and "a.wav" in questions[0]["note"]
    sound = soundfile.info(io.BytesIO(base64.b64decode(questions[1]["clip"].partition(",")[2])))
    assert sound.format == "OGG" and sound.duration == 30, "what a model hears of 40 s"


@pytest.mark.parametrize("clip", ["../../private.wav", "{folder}/private.wav"])
def test_a_clip_outside_the_audio_folder_is_not_in_the_report(tmp_path, clip):
    """A results file from elsewhere could name any audio of whoever builds the report."""
    (tmp_path / "run" / "clips").mkdir(parents=True)
    soundfile.write(tmp_path / "private.wav", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    questions = rows(1)
    questions[0]["audio_id"] = clip.format(folder=tmp_path)
    write_result(tmp_path / "run", "100", 1, questions)
    folder = tmp_path / "run"
    for allowed in (False, True):
        page = Page(build_report(folder, folder / "clips", 1, folder, allow_outside=allowed))
        (question,) = page.data["sets"][0]["questions"]
        assert question["clip"].startswith("data:audio/ogg") == allowed
        assert bool(question["clip"]) == allowed and ("--allow_outside" in question["note"]) != allowed


def select(data: dict, **filter) -> list[str]:
    """The ids that the page's own script leaves, run by Node."""
    if not (node := shutil.which("node")):
        pytest.skip("needs node, to run the report's script")
    filter = {"text": "", "task": "", "outcome": "any", "checkpoint": "1", "before": "0", "key": "number"} | filter
    script = (ROOT / "src" / "utils" / "report.js").read_text()
    script += "\nconst [sets, filter] = JSON.parse(require('fs').readFileSync(0));"
    script += "\nconsole.log(JSON.stringify(select(sets[0].questions, filter).map((question) => question.id)));"
    done = subprocess.run(
        [node, "-e", script], input=json.dumps([data["sets"], filter]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_list_is_filtered_searched_and_sorted(folder, page):
    data = page.data
    results, _ = read_results(folder)
    rights = {result.label: result.right for result in results}
    changed = [id_ for id_ in rights["base"] if rights["base"][id_] != rights["100"][id_]]
    assert changed == [f"{number}" for number in range(9, 21)]
    assert select(data, outcome="changed") == select(data, outcome="gained") == changed
    assert select(data, outcome="lost") == [] and select(data, outcome="lost", checkpoint="0", before="1") == changed
    assert select(data, outcome="right") == [id_ for id_, right in rights["100"].items() if right]
    assert select(data, outcome="wrong", task="music") == ["22", "25", "28"]
    assert select(data, text=" IT Barks. ") == ["4"]
    assert select(data, key="number", down=True)[:2] == ["29", "28"]
    assert select(data, key="rights")[:2] == ["3", "21"] and select(data, key="rights", down=True)[:2] == ["0", "1"]
    assert select(data, key="said")[-1] == "20", "equal ones stay in their order"


def test_the_paired_test_stands_beside_the_changes(folder, page):
    (button,) = [attributes for _, attributes in page.elements if attributes.get("class") == "changes"]
    assert (button["data-set"], button["data-from"], button["data-to"]) == ("0", "0", "1")
    rights = {result.label: result.right for result in read_results(folder)[0]}
    difference = compare(rights["base"], rights["100"])
    interval, p_value = "{:+.2f} to {:+.2f}".format(*difference.interval), difference.p
    assert ["base", "100", "+40.00", interval, p_value, "12", "0", "show"] in page.rows


def test_accuracies_stand_by_checkpoint_task_difficulty_and_category(folder, page):
    low, high = {result.label: result.interval for result in read_results(folder)[0]}["100"]
    (row,) = [row for row in page.rows if row[:1] == ["100"]]
    assert row[1:6] == ["60.00 (10)", "70.00 (10)", "70.00 (10)", "66.67 (30)", f"{low:.2f} - {high:.2f}"]
    assert ["sound", "20.00 (10)", "60.00 (10)"] in page.rows and ["easy", "26.67 (30)", "66.67 (30)"] in page.rows
    assert ["Counting", "27.59 (29)", "68.97 (29)"] in page.rows and [clean(EVIL), "0.00 (1)", "0.00 (1)"] in page.rows


def test_settings_are_those_of_the_newest_whole_record_without_secrets(tmp_path):
    kept = {"learning_rate": 1.25e-6, "lr_scheduler_type": "linear", "beta": 0.0, "loss_type": "grpo"}
    secret = {"hub_token": "secret", "model_init_kwargs": {"token": "secret"}, "resume_token": None}
    for step, content in ((1, json.dumps({"settings": kept | secret})), (2, "{"), (3, "[1]")):
        path = tmp_path / f"checkpoint-{step}" / "resume.json"
        path.parent.mkdir()
        path.write_text(content)
        os.utime(path, (step, step))
    assert read_settings(tmp_path) == kept
    assert read_settings(tmp_path / "none") == {}


def test_completions_of_the_training_with_their_rewards(tmp_path, page):
    assert "Step 10" in page.text and ["completion", "accuracy_reward", "advantage"] in page.rows
    assert ["a dog", "1", "1.25"] in page.rows and "nobody" not in page.text, "one group of a step"
    for step in range(1, 101):
        write_completions(tmp_path, step)
    (tmp_path / "completions" / "completions_00100.parquet").write_bytes(b"PAR1")
    notes = []
    steps = [sample["step"] for sample in read_completions(tmp_path, notes)]
    assert len(steps) == 19 and steps[0] == 1 and max(np.diff(steps)) <= 6, "20, evenly spread"
    assert len(notes) == 1 and "completions_00100.parquet: not read" in notes[0]


def test_each_part_says_what_is_missing(tmp_path):
    write_state(tmp_path / "trained", 3)
    page = Page(build(tmp_path / "trained"))
    assert "No evaluated checkpoints" in page.text and "resume.json" in page.text and not page.raw["script"]
    assert "--log_completions true" in page.text and [tag for tag, _ in page.elements].count("img") == 1
    write_result(tmp_path / "asked", "100", 150)
    page = Page(build(tmp_path / "asked"))
    assert [tag for tag, _ in page.elements].count("img") == 1 and "needs two evaluated checkpoints" in page.text
    assert len(page.data["sets"][0]["questions"]) == 300
    write_result(tmp_path / "asked", "200", 150, rows(30))
    assert [len(asked["questions"]) for asked in Page(build(tmp_path / "asked")).data["sets"]] == [300, 30]


def test_the_papers_rows_stand_beside_its_own_questions(tmp_path, monkeypatch):
    write_result(tmp_path, "100", 15, rows(30))
    paper = ["the paper's: GRPO + Prompt <2>", "69.37", "66.77", "57.36", "64.50"]
    assert paper not in [row[:5] for row in Page(build(tmp_path)).rows]
    monkeypatch.setitem(RELEASES, content_digest(rows(30)), "original of 2025-01-28")
    assert paper in [row[:5] for row in Page(build(tmp_path)).rows]


def test_the_script_writes_the_file_or_one_sentence(folder, tmp_path, monkeypatch, capsys):
    def start(*arguments):
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
        report.main()
        return capsys.readouterr().out.strip()

    out = tmp_path / "other" / "r.html"
    out.parent.mkdir()
    assert start(folder, "--audio_dir", folder / "clips", "--clips", "1", "--out", out) == str(out)
    questions = Page(out.read_text(encoding="utf-8")).data["sets"][0]["questions"]
    assert [question["id"] for question in questions if question["clip"].startswith("data:")] == ["9"]
    assert (out.parent / unquote(questions[0]["clip"])).samefile(folder / "clips" / "0.wav")
    for bad, reason in ((tmp_path / "gone", "no such folder"), (tmp_path / "other", "holds no results")):
        with pytest.raises(SystemExit, match=f"^report.py: {bad}: {reason}.*$"):
            start(bad)


def test_clips_are_found_where_the_results_record_them(tmp_path, monkeypatch):
    for name in ("clips", "other"):
        (tmp_path / "data" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "data" / name / f"{name}.wav", np.sin(np.arange(16_000)), 16_000)
        questions = [row | {"audio_id": f"{name}.wav", "question": name} for row in rows(1)]
        write_result(tmp_path / "exp", name, 1, questions, audio_dir=f"../data/{name}")
    monkeypatch.chdir(tmp_path)
    page = Page(build_report(Path("exp"), None, 2, Path("exp")))
    clips = [question["clip"] for asked in page.data["sets"] for question in asked["questions"]]
    assert len(clips) == 2 and all(clip.startswith("data:") for clip in clips)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # results may name any file: only those below the current folder are used
    page = Page(build_report(tmp_path / "exp", None, 2, tmp_path / "exp"))
    assert all(question["clip"] == "" for asked in page.data["sets"] for question in asked["questions"])


CONTRAST = """
const canvas = (color) => color.match(/\\d+/g).slice(0, 3).map((part) => part / 255)
  .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
const light = (color) => canvas(color).reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
const ground = (element) => { for (; element; element = element.parentElement) {
  const color = getComputedStyle(element).backgroundColor; if (!color.endsWith(", 0)")) return color; } };
return Math.min(...[...document.querySelectorAll("p, a, th, td, label, summary, h1, h2, .right, .wrong, .missing, .kind, pre")].map(
  (element) => { const pair = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
                 return (pair[0] + 0.05) / (pair[1] + 0.05); }));
"""


@pytest.mark.slow
def test_in_a_browser(folder, html, browser):
    """Opens without an error or request; filters work; a clip plays; legible at 400 px, in the dark, by keyboard."""
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    browser.open(path)
    count = "return document.getElementById('count').textContent"
    assert browser.run(count) == "30 of 30 questions" and browser.run("return document.title").endswith(": report")
    assert browser.run("return [...document.images].every((image) => image.naturalWidth > 400)")
    browser.run("document.querySelector('.changes').click()")
    assert browser.run(count) == "12 of 30 questions"
    browser.run("document.querySelector('.open').click()")
    played = """return (async () => { const clip = document.querySelector('audio'); clip.muted = true; await clip.play();
        await new Promise((done) => (clip.ontimeupdate = () => clip.currentTime > 0 && done())); return clip.duration })()"""
    assert browser.run(played) == pytest.approx(1, abs=0.1)
    browser.run("document.querySelector('#list .question button').focus()")
    browser.press(ENTER)
    assert browser.run("return document.querySelector('th.question').getAttribute('aria-sort')") == "ascending"
    browser.press(TAB)
    outline = "return [document.activeElement.dataset.key, getComputedStyle(document.activeElement).outlineStyle]"
    assert browser.run(outline) == ["task", "solid"]
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.devtools("Emulation.setEmulatedMedia", features=features)
        assert browser.run(CONTRAST) >= 4.5, scheme
        for width in (400, 1200):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.devtools("Emulation.setDeviceMetricsOverride", **size)
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), (scheme, width)
            assert browser.run(
                "return document.querySelector('#list td.said').getBoundingClientRect().right <= innerWidth"
            )
    assert browser.log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert path.as_uri() in urls and not [url for url in urls if url != path.as_uri() and url[:5] != "data:"]
    choose = "document.getElementById('outcome').value = 'any'; document.querySelector('#list .number button').click()"
    browser.run(f"{choose}; document.querySelectorAll('.open')[0].click()")  # question 0: its clip is linked
    assert browser.run("return document.querySelector('audio').getAttribute('src')") == "./clips/0.wav"
    assert browser.run(played) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_9000_questions_open_in_2_s(tmp_path, browser):
    """Of the processor's time: others may be at work on the machine."""
    for label, right in (("base", 4000), ("100", 6000)):
        file = write_result(tmp_path, label, right, rows(9000))
        records = [row | {"model_completion": "<think>It barks." * 20} for row in json.loads(file.read_text())]
        file.write_text(json.dumps(records))
    path = tmp_path / "report.html"
    path.write_text(build(tmp_path, clips=0), encoding="utf-8")
    browser.devtools("Performance.enable")
    browser.open(path)
    metrics = {metric["name"]: metric["value"] for metric in browser.devtools("Performance.getMetrics")["metrics"]}
    assert browser.run("return document.getElementById('count').textContent") == "9000 of 9000 questions"
    assert metrics["ProcessTime"] < 2, metrics
