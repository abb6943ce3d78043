"""prepare_mmau.py: the repository's files and the hub's parquet end in the same layout; releases keep apart; clips are
written byte for byte; bad sources are named."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset

from conftest import content_digest, write_tone
from dataset.questions import RELEASES, load_questions
from prepare_mmau import hub_record, main, remove_prefixes
from run.check import Rules, examine_evaluation_file

REVISED = "v05.15.25"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def items(count: int = 4) -> list[dict]:
    """Made-up questions in MMAU's format."""
    keys = {"dataset": "AudioSet", "task": "sound", "split": "test-mini", "category": "Reasoning", "difficulty": "easy"}
    return [
        {"id": f"id-{i}", "audio_id": f"./test-mini-audios/id-{i}.wav", "question": f"What is {i}?"}
        | {"choices": ["Man", "(A) minor", "C#"], "answer": "(A) minor"} | keys
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def clips(tmp_path) -> dict[str, bytes]:
    """A clip's content for each of `items`; one is MP3, as 46 of the real ones are."""
    contents = {}
    for i in range(4):
        write_tone(tmp_path / "made", 0.5, frequency=300 + i, format="MP3" if i == 1 else "WAV")
        contents[f"id-{i}.wav"] = (tmp_path / "made").read_bytes()
    return contents


def write_json(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mmau-test-mini.json").write_text(json.dumps(rows))
    return folder / "mmau-test-mini.json"


def write_tar(folder: Path, clips: dict[str, bytes], inner: str = "test-mini-audios/") -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "test-mini-audios.tar.gz", "w:gz") as archive:
        for name, content in clips.items():
            member = tarfile.TarInfo(inner + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder / "test-mini-audios.tar.gz"


def hub_rows(rows: list[dict], clips: dict[str, bytes]) -> list[dict]:
    """The same questions as the hub has them."""

    def attributes(row):
        kept = {key: value for key, value in row.items() if key not in ("question", "choices", "answer", "audio_id")}
        return kept | ({"category": ["Reasoning"]} if row["id"] == "id-2" else {})

    return [
        {
            "context": {"bytes": clips.get(f"{row['id']}.wav"), "path": None},
            "instruction": row["question"],
            "choices": [f"({'ABC'[i]}) {choice}" for i, choice in enumerate(row["choices"])],
            "answer": f"(B) {row['answer']}",
            "other_attributes": json.dumps(attributes(row)),
        }
        for row in rows
    ]  # fmt: skip


def laid_out(folder: Path) -> tuple[list[dict], dict[str, bytes]]:
    rows = json.loads((folder / "mmau-test-mini.json").read_text())
    return rows, {path.name: path.read_bytes() for path in (folder / "test-mini-audios").iterdir()}


def test_json_and_tar(tmp_path, clips, capsys):
    source = tmp_path / "download"
    arguments = [
        "--json",
        str(write_json(source, items())),
        "--audio",
        str(write_tar(source, clips | {"other.wav": b"x"})),
    ]
    out = tmp_path / "MMAU"
    assert main([*arguments, "--out", str(out)]) == 1
    assert "--release" in capsys.readouterr().err
    assert main([*arguments, "--out", str(out), "--release", "original"]) == 0
    assert laid_out(out) == (items(), clips), "byte for byte, and no clip that no question names"
    assert f"{out}: release unrecognised, 4 questions, 0 without a clip" in capsys.readouterr().out
    assert len(load_questions(out / "mmau-test-mini.json").questions) == 4
    assert not examine_evaluation_file(out / "mmau-test-mini.json", Rules(deep=True)).dropped


def test_the_readmes_layout_is_completed_in_place(tmp_path, clips):
    write_json(tmp_path / "MMAU", items())
    write_tar(tmp_path / "MMAU", clips)
    for _ in range(2):
        assert main(["--out", str(tmp_path / "MMAU"), "--release", "original"]) == 0
        assert laid_out(tmp_path / "MMAU") == (items(), clips)


@pytest.mark.parametrize("typed", [False, True], ids=["struct", "Audio"])
def test_the_hubs_parquet_gives_the_same(tmp_path, clips, typed):
    path = tmp_path / "hub" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    rows = hub_rows(items(), clips)
    if typed:
        Dataset.from_list(rows).cast_column("context", Audio(decode=False)).cast_column("context", Audio()).to_parquet(
            path
        )
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    for i, source in enumerate((path.parent, path)):
        out = tmp_path / f"MMAU{i}"
        assert main(["--hub", str(source), "--out", str(out), "--release", REVISED]) == 0
        assert laid_out(out / REVISED) == (items(), clips)


def test_prefixes():
    assert remove_prefixes(["(A) x", "(B) (B) y", "(C)z"], "(B) (B) y") == ["x", "(B) y", "z", "(B) y"]
    assert remove_prefixes(["(A) minor", "C major"], "(A) minor") == ["(A) minor", "C major", "(A) minor"]
    assert remove_prefixes(["(A) x", "(B) y"], "") == ["x", "y", ""]


@pytest.mark.parametrize("attributes", ["{", "[]", "null", "{}", None])
def test_a_hub_row_without_attributes_is_named(attributes):
    row = {"instruction": "What?", "choices": ["(A) x"], "answer": "(A) x", "other_attributes": attributes}
    with pytest.raises(ValueError, match="row 3: `other_attributes`"):
        hub_record(row, 3)


def test_both_releases_each_in_its_own_folder(tmp_path, clips, monkeypatch, capsys):
    """The release is told by the questions; the same clip names may hold other sounds."""
    revised = [row | {"question": f"Revised {row['id']}?"} for row in items()]
    monkeypatch.setitem(RELEASES, content_digest(items()), "original of 2025-01-28")
    monkeypatch.setitem(RELEASES, content_digest(revised), f"{REVISED} of 2025-08-09")
    other = {name: content[:-2] for name, content in clips.items()}
    out = tmp_path / "MMAU"
    for name, rows, content in (("a", items(), clips), ("b", revised, other)):
        source = tmp_path / name
        flags = ["--json", str(write_json(source, rows)), "--audio", str(write_tar(source, content)), "--out", str(out)]
        assert main(flags) == 0
        wrong = REVISED if name == "a" else "original"
        assert main([*flags, "--release", wrong]) == 1
        assert wrong in capsys.readouterr().err
    assert laid_out(out) == (items(), clips) and laid_out(out / REVISED) == (revised, other)
    assert load_questions(out / REVISED / "mmau-test-mini.json").release == f"{REVISED} of 2025-08-09"


def test_the_hub_gives_a_known_content(tmp_path, clips, monkeypatch, capsys):
    """Its lettered choices and answers are those of the JSON, so its content is recognised as the JSON's is."""
    monkeypatch.setitem(RELEASES, content_digest(items()), "original of 2025-01-28")
    pq.write_table(pa.Table.from_pylist(hub_rows(items(), clips)), tmp_path / "hub.parquet")
    assert main(["--hub", str(tmp_path / "hub.parquet"), "--out", str(tmp_path / "MMAU")]) == 0
    assert "release original of 2025-01-28, 4 questions, 0 without a clip" in capsys.readouterr().out


def test_real_questions(shared, tmp_path, capsys):
    """The real JSON is the revised release; only one of its clips is here, and the others are reported."""
    source = shared / "data" / "mmau"
    out = tmp_path / "MMAU"
    flags = ["--json", str(source / "mmau-test-mini.json"), "--audio", str(source), "--out", str(out)]
    assert main(flags) == 1
    printed = capsys.readouterr().out
    assert f"{out / REVISED}: release {REVISED} of 2025-08-09, 1000 questions, 999 without a clip" in printed
    assert printed.count("  missing: ") == 10 and "... and 989 more" in printed
    rows, clips = laid_out(out / REVISED)
    assert rows == json.loads((source / "mmau-test-mini.json").read_text())
    assert clips == {path.name: path.read_bytes() for path in source.glob("*.wav")}


def test_the_full_test(tmp_path, clips):
    rows = [row | {"split": "test", "answer": "", "audio_id": f"./test-audios/{row['id']}.wav"} for row in items()]
    flags = ["--json", str(write_json(tmp_path / "a", rows)), "--audio", str(write_tar(tmp_path / "a", clips, ""))]
    assert main([*flags, "--out", str(tmp_path / "MMAU"), "--release", REVISED]) == 0
    folder = tmp_path / "MMAU" / REVISED
    assert json.loads((folder / "mmau-test.json").read_text()) == rows
    assert len(list((folder / "test-audios").iterdir())) == 4
    assert not examine_evaluation_file(folder / "mmau-test.json").dropped


def test_an_interrupted_run_goes_on(tmp_path, clips):
    """What is whole stays, what is half is written again."""
    flags = ["--json", str(write_json(tmp_path / "a", items())), "--audio", str(write_tar(tmp_path / "a", clips))]
    flags += ["--out", str(tmp_path / "MMAU"), "--release", "original"]
    folder = tmp_path / "MMAU" / "test-mini-audios"
    folder.mkdir(parents=True)
    (folder / "id-0.wav").write_bytes(clips["id-0.wav"])
    (folder / "id-1.wav").write_bytes(clips["id-1.wav"][:100])
    (folder / "id-2.wav.tmp").write_bytes(b"half")
    before = (folder / "id-0.wav").stat().st_mtime_ns
    assert main(flags) == 0
    assert (folder / "id-0.wav").stat().st_mtime_ns == before
    assert laid_out(tmp_path / "MMAU")[1] == clips


def test_a_malicious_tar_writes_nothing_outside(tmp_path, clips):
    tar = tmp_path / "evil.tar"
    with tarfile.open(tar, "w") as archive:
        for name in ("../../outside.wav", "/outside.wav", "../id-0.wav"):
            member = tarfile.TarInfo(name)
            member.size = len(clips["id-0.wav"])
            archive.addfile(member, io.BytesIO(clips["id-0.wav"]))
        link = tarfile.TarInfo("id-1.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    question_file = write_json(tmp_path / "a", items())
    assert (
        main(
            [
                "--json",
                str(question_file),
                "--audio",
                str(tar),
                "--out",
                str(tmp_path / "MMAU"),
                "--release",
                "original",
            ]
        )
        == 1
    )
    assert laid_out(tmp_path / "MMAU")[1] == {"id-0.wav": clips["id-0.wav"]}
    assert not list(tmp_path.rglob("outside.wav"))


@pytest.mark.parametrize("audio_id", ["../outside/id-0.wav", "/outside/id-0.wav", "a/../../id-0.wav"])
def test_questions_cannot_name_clips_outside(tmp_path, clips, audio_id, capsys):
    rows = [items()[0] | {"audio_id": audio_id}]
    flags = ["--json", str(write_json(tmp_path / "a", rows)), "--audio", str(write_tar(tmp_path / "a", clips))]
    assert main([*flags, "--out", str(tmp_path / "MMAU"), "--release", "original"]) == 1
    assert audio_id in capsys.readouterr().err and not (tmp_path / "MMAU").exists()


def test_what_is_refused(tmp_path, clips, capsys):
    out = tmp_path / "MMAU"

    def refused(*flags: str) -> str:
        assert main([*flags, "--out", str(out), "--release", "original"]) == 1
        return capsys.readouterr().err

    message = refused()
    assert "--hub" in message and "--json" in message
    question_file, tar = str(write_json(tmp_path / "a", items())), str(write_tar(tmp_path / "a", clips))
    (tmp_path / "broken.tar.gz").write_bytes(Path(tar).read_bytes()[:-2000])
    (tmp_path / "damaged.tar.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 100)
    (tmp_path / "page.tar.gz").write_text("<html>Google Drive")
    for name in ("gone.tar", "broken.tar.gz", "damaged.tar.gz", "page.tar.gz"):
        assert name in refused("--json", question_file, "--audio", str(tmp_path / name))
    twice = str(write_json(tmp_path / "b", items() * 2))
    assert "id-0" in refused("--json", twice, "--audio", tar)
    no_clip = str(write_json(tmp_path / "c", [{key: value for key, value in items()[0].items() if key != "audio_id"}]))
    assert "audio_id" in refused("--json", no_clip, "--audio", tar)
    pq.write_table(pa.table({"question": ["What?"]}), tmp_path / "other.parquet")
    assert "answer, choices, context" in refused("--hub", str(tmp_path / "other.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    for name in (str(tmp_path / "broken.parquet"), "nobody/has-this"):
        assert name in refused("--hub", name)
    assert main(["--json", question_file, "--audio", tar, "--out", str(out), "--release", "original"]) == 0
    capsys.readouterr()
    other = str(write_json(tmp_path / "d", items(3)))
    assert str(out) in refused("--json", other, "--audio", tar)
    with pytest.raises(SystemExit):
        main(["--json", question_file])
