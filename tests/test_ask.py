"""ask.py: one question about one file."""

import re
import shutil
import sys

import numpy as np
import pytest
import torch

import ask
import row_by_row
from conftest import write_tone
from dataset.audio import load_audio
from dataset.prompt import build_question, save_style
from model.checkpoints import load_model
from model.qwen2_audio import load_processor

CHOICES = ["dog", "cat", "bell"]


@pytest.fixture
def clip(tmp_path):
    write_tone(tmp_path / "clip.wav", seconds=1.0, rate=44_100, channels=2)
    return tmp_path / "clip.wav"


@pytest.fixture
def run(monkeypatch, capsys, small_model, clip):
    """Run the command line; returns (exit status, standard output, standard error)."""

    def run(*flags, model=small_model, audio=clip):
        command = [
            "ask.py",
            "--model_path",
            model,
            "--audio",
            audio,
            "--question",
            "What?",
            "--choices",
            *CHOICES,
            *flags,
        ]
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


def test_the_recorded_style_is_the_default(small_model, clip, monkeypatch, run, tmp_path):
    copy = shutil.copytree(small_model, tmp_path / "copy")
    save_style(copy, "think")
    styles = []
    monkeypatch.setattr(ask, "ask", lambda *args: styles.append(args[5]) or ("<answer>dog</answer>", [1.0, 0.0, 0.0]))
    run(model=copy)
    run("--prompt_style", "choice", model=copy)
    assert styles == ["think", "choice"]


def test_a_clip_over_the_window_is_refused_or_cut(run, tmp_path):
    write_tone(tmp_path / "long.wav", seconds=5)  # the window is 2 s
    status, _, error = run(audio=tmp_path / "long.wav")
    assert status == 1 and "lasts 5.00 s, the model hears 2 s; --start" in error
    assert run("--start", 3.5, "--max_new_tokens", 2, audio=tmp_path / "long.wav")[0] == 0
    status, _, error = run("--start", 5, audio=tmp_path / "long.wav")
    assert status == 1 and "outside" in error
    whole = load_audio(tmp_path / "long.wav")
    assert np.array_equal(ask.cut_clip(tmp_path / "long.wav", 1.5, 32_000), whole[24_000:56_000])


@pytest.mark.parametrize(
    "flags, message", [({"audio": "none.wav"}, "no such"), ({"model": "no/such/model"}, "no such folder")]
)
def test_mistakes_are_said_without_a_traceback(run, flags, message):
    status, _, error = run(**flags)
    assert status == 1 and error.startswith("ask: ") and message in error


def test_one_choice_is_no_question(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        ask.parse_args(["--model_path", "m", "--audio", "a", "--question", "q", "--choices", "dog"])
    assert "at least two" in capsys.readouterr().err
