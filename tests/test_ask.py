"""ask.py: one question about one file."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import ask
import row_by_row
from conftest import ROOT, write_tone
from dataset.audio import load_audio
from dataset.prompt import build_question, save_style
from evaluation.checkpoints import load_model
from model.qwen2_audio import load_processor
from running import environment

CHOICES = ["dog", "cat", "bell"]


@pytest.fixture
def clip(tmp_path):
    write_tone(tmp_path / "clip.wav", seconds=1.0, rate=44_100, channels=2)
    return tmp_path / "clip.wav"


@pytest.fixture
def run(monkeypatch, capsys, small_model, clip):
    """Run the command line; returns (exit status, standard output, standard error)."""

    def run(*flags, model=small_model, audio=clip, question="What?", choices=CHOICES):
        command = ["ask.py", "--model_path", model, "--audio", audio, "--question", question, "--choices", *choices]
        command += flags
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        status = ask.main()
        return status, *capsys.readouterr()

    return run


def test_prints_answer_completion_and_probabilities(run):
    status, out, _ = run("--max_new_tokens", 10)
    assert status == 0
    assert out.startswith("answer:") and "\ncompletion: " in out
    found = {choice: float(percent) for percent, choice in re.findall(r"^ *([\d.]+)%  (\w+)$", out, re.MULTILINE)}
    assert set(found) == set(CHOICES)
    assert sum(found.values()) == pytest.approx(100, abs=0.05)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_probabilities_are_those_of_the_whole_replies(small_model, clip):
    processor = load_processor(small_model)
    model = load_model(small_model, torch.float32, torch.device("cpu"))
    audio = load_audio(clip)
    _, probabilities = ask.ask(model, processor, audio, "What?", CHOICES, "answer", max_new_tokens=2)
    logps = []
    for choice in CHOICES:
        inputs = row_by_row.encode(processor, [build_question("What?", CHOICES, "answer")], [audio])
        reply = processor.tokenizer(f"<answer>{choice}</answer><|im_end|>", return_tensors="pt")["input_ids"]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], reply], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -reply.shape[1] - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(1, reply.T).sum())
    assert probabilities == pytest.approx(torch.stack(logps).softmax(0).tolist(), abs=1e-5)


def test_in_think_style_the_choices_follow_the_thinking(small_model, clip, monkeypatch):
    processor = load_processor(small_model)
    model = load_model(small_model, torch.float32, torch.device("cpu"))
    thought = "<think>cat</think> <answer>dog</answer>"
    monkeypatch.setattr(ask, "generate", lambda *args: [processor.tokenizer(thought)["input_ids"]])
    scored = []
    monkeypatch.setattr(ask, "score", lambda model, batch, ids: scored.extend(ids) or torch.zeros(len(ids)))
    completion, _ = ask.ask(model, processor, load_audio(clip), "What?", CHOICES, "think")
    assert completion == thought
    expected = [f"<think>cat</think> <answer>{choice}</answer><|im_end|>" for choice in CHOICES]
    assert [processor.tokenizer.decode(ids) for ids in scored] == expected


def test_the_recorded_style_is_the_default(small_model, monkeypatch, run, tmp_path):
    copy = shutil.copytree(small_model, tmp_path / "copy")
    save_style(copy, "think")
    styles = []
    monkeypatch.setattr(ask, "ask", lambda *args: styles.append(args[5]) or ("<answer>dog</answer>", [1.0, 0.0, 0.0]))
    run(model=copy)
    run("--prompt_style", "choice", model=copy)
    assert styles == ["think", "choice"]


def test_an_answer_that_counts_for_no_choice_is_said_to_be_none_of_them(run, small_model, monkeypatch):
    tokenizer = load_processor(small_model).tokenizer
    for completion, named in [
        ("<answer>cat</answer>", True),
        ("<answer>The Cat.</answer>", True),  # not letter for letter, but MMAU counts it
        ("a bell", True),
        ("<answer>dog cat</answer>", False),
        ("<answer>catalogue</answer>", False),
        ("<answer></answer>", False),
    ]:
        monkeypatch.setattr(ask, "generate", lambda *_, written=completion: [tokenizer(written)["input_ids"]])
        _, out, _ = run()
        assert ("none of the choices" not in out) == named, out
        assert json.loads(run("--json")[1])["names_a_choice"] == named


def test_json_holds_everything_in_the_order_of_the_choices(run, small_model, clip):
    status, out, _ = run("--json", "--max_new_tokens", 4, "--prompt_style", "choice")
    found = json.loads(out)
    assert status == 0
    probabilities = found.pop("probabilities")
    assert list(probabilities) == CHOICES and sum(probabilities.values()) == pytest.approx(1)
    _, text, _ = run("--max_new_tokens", 4, "--prompt_style", "choice")
    completion, names_a_choice = found.pop("completion"), found.pop("names_a_choice")
    assert f"completion: {completion}\n" in text and names_a_choice == ("none of the choices" not in text)
    for choice, probability in probabilities.items():
        assert f"{100 * probability:9.2f}%  {choice}\n" in text
    assert found == {
        "model": str(small_model),
        "style": "choice",
        "prompt": build_question("What?", CHOICES, "choice"),
        "audio": str(clip),
        "seconds": 1.0,
        "answer": completion.strip(),
    }


def test_json_is_alone_on_standard_output_whatever_libraries_print(run, monkeypatch):
    load = ask.load_model
    monkeypatch.setattr(ask, "load_model", lambda *args: print("a library's notice") or load(*args))
    _, out, error = run("--json", "--max_new_tokens", 2)
    assert json.loads(out)["model"] and "a library's notice" in error


def test_seconds_are_those_that_are_heard(run, tmp_path):
    write_tone(tmp_path / "long.wav", seconds=5)
    out = run("--json", "--max_new_tokens", 2, "--start", 3.5, audio=tmp_path / "long.wav")[1]
    assert json.loads(out)["seconds"] == 1.5


def test_audio_channels_are_heard_as_asked(run, tmp_path):
    noise = np.random.default_rng(0).normal(scale=0.3, size=(16_000, 2))
    soundfile.write(tmp_path / "both.wav", noise, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "first.wav", noise[:, 0], 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "mean.wav", noise.mean(axis=1), 16_000, subtype="FLOAT")

    def probabilities(name, *flags):
        return list(json.loads(run("--json", *flags, audio=tmp_path / name)[1])["probabilities"].values())

    first, mean = probabilities("first.wav"), probabilities("mean.wav")
    assert first != pytest.approx(mean, rel=1e-3), "or this test could not fail"
    assert probabilities("both.wav") == pytest.approx(first, rel=1e-3)
    assert probabilities("both.wav", "--audio_channels", "mean") == pytest.approx(mean, rel=1e-3)


def test_a_clip_over_the_window_is_refused_or_cut(run, tmp_path):
    write_tone(tmp_path / "long.wav", seconds=5)  # the window is 2 s
    status, _, error = run(audio=tmp_path / "long.wav")
    assert status == 1 and "5.00 s" in error and "--start" in error
    assert run("--start", 3.5, "--max_new_tokens", 2, audio=tmp_path / "long.wav")[0] == 0
    for start in (5, -1, "nan"):
        status, _, error = run(f"--start={start}", audio=tmp_path / "long.wav")
        assert status == 1 and "--start" in error and "5.00 s" in error
    whole = load_audio(tmp_path / "long.wav")
    assert np.array_equal(ask.cut_clip(whole, 1.5, 32_000), whole[24_000:56_000])


def assert_one_line(result, *words: str) -> None:
    """A run that ended in one line on standard error, with these words and no advice about the row of a file."""
    status, out, error = result
    assert (status, out, len(error.splitlines())) == (1, "", 1) and error.startswith("ask: "), result
    assert all(word in error for word in words) and not re.search(r"\brow\b", error), error


@pytest.mark.parametrize(
    "given, words",
    [
        ({"audio": "none.wav"}, ["none.wav"]),
        ({"model": "no/such/model"}, ["no/such/model"]),
        ({"model": "m" * 5000}, []),
        ({"question": "What <|AUDIO|> is it?"}, ["<|AUDIO|>"]),
        ({"choices": ["dog", "<|im_end|>"]}, ["<|im_end|>"]),
        ({"question": " "}, ["question"]),
        ({"choices": ["dog"]}, ["--choices"]),
        ({"choices": ["dog", " "]}, ["--choices"]),
        ({"choices": ["dog", "cat", "dog"]}, ["--choices"]),
        ({"question": "What \udce9?"}, ["'What \\udce9?'"]),
        ({"choices": ["dog", "\udce9"]}, ["'\\udce9'"]),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(run, given, words):
    assert_one_line(run(**given), *words)
    assert_one_line(run("--json", **given), *words)


def test_an_unusable_clip_is_said_without_a_row(run, tmp_path):
    write_tone(tmp_path / "short.wav", seconds=0.05)
    write_tone(tmp_path / "long.wav", seconds=5)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    assert_one_line(run(audio=tmp_path / "short.wav"), "0.050 s")
    assert_one_line(run(audio=tmp_path / "none.wav"), "none.wav")
    assert_one_line(run("--start", 4.95, audio=tmp_path / "long.wav"), "0.050 s")
    assert_one_line(run(audio=tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("processor_config.json", "{"),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_a_model_with_a_damaged_processor_is_named(run, small_model, tmp_path, name, content):
    model = shutil.copytree(small_model, tmp_path / "damaged")
    (model / name).write_text(content)
    assert_one_line(run(model=model), str(model), "processor")


@pytest.mark.parametrize("base", ["/gone", "gone/gone", None])
def test_an_adapter_without_its_base_is_named(run, small_model, tmp_path, base):
    adapter = shutil.copytree(small_model, tmp_path / "adapter")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    assert_one_line(run(model=adapter), str(adapter), base or "base_model_name_or_path")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_files_that_cannot_be_read_are_named(run, small_model, clip, tmp_path):
    model = shutil.copytree(small_model, tmp_path / "locked")
    (model / "tokenizer.json").chmod(0)
    assert_one_line(run(model=model), str(model))
    clip.chmod(0)
    assert_one_line(run(), str(clip))


def test_ctrl_c_during_the_imports_exits_without_a_traceback(tmp_path):
    """A `torch` whose import is interrupted, for the moment at which most people press the keys."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    command = [sys.executable, "src/ask.py", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(PYTHONPATH=tmp_path), capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "ask: interrupted\n")


def test_a_terminal_that_lacks_characters_gets_them_escaped(run, monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run("--max_new_tokens", 2, choices=["H\u00fcnd", "cat"])[0] == 0
        assert b"%  H\\xfcnd" in terminal.buffer.getvalue()


def test_neither_choices_nor_the_completion_control_the_terminal(run, small_model, monkeypatch):
    completion = load_processor(small_model).tokenizer("dog")["input_ids"]
    monkeypatch.setattr(ask, "generate", lambda *_: [completion])
    monkeypatch.setattr(ask, "extract_answer", lambda completion: f"{completion}\x1b[2J")
    status, out, _ = run(choices=["dog\x1b[2J", "cat"])
    assert status == 0 and "\x1b" not in out and out.count("U+001B") == 2
    assert "\x1b[2J" in json.loads(run("--json", choices=["dog\x1b[2J", "cat"])[1])["answer"]
    assert "\x1b" not in run(question="\x1b[2J<|AUDIO|>")[2]


def test_less_than_one_new_token_is_no_completion(capsys):
    with pytest.raises(SystemExit):
        ask.parse_args("--model_path m --audio a --question q --choices dog cat --max_new_tokens 0".split())
    assert "--max_new_tokens" in capsys.readouterr().err
