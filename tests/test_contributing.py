"""What CONTRIBUTING.md says a reward, a prompt style, a benchmark or a model takes: a toy of each is added to a copy of
`src`, in the files that are listed and no others, and used by training, evaluation and table as a person would."""

import json
import re
import shutil
from pathlib import Path

import pytest

from conftest import ROOT
from running import run

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def listed(what: str) -> list[str]:
    """The bullets under `**a reward**`, say: their paths."""
    section = PAGE.partition(f"**{what}**")[2].partition("\n\n")[2].partition("\n\n")[0]
    return [re.match(r"- .*?`([^`]+)`", line)[1] for line in section.splitlines()]


class Copy:
    """A copy of `src` to edit, which remembers in which files that was."""

    def __init__(self, folder: Path):
        self.folder, self.touched = folder, set()
        shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.folder / path).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{path}: {old!r} stands there {text.count(old)} times"
        (self.folder / path).write_text(text.replace(old, new), encoding="utf-8")
        self.touched.add(path)

    def run(self, preloaded: Path, script: str, *arguments) -> str:
        return run("python", script, *arguments, cwd=self.folder, PRELOADED=preloaded).stdout


def add_reward(copy: Copy) -> None:
    end = "for text, asked in zip(completions, style, strict=True)]\n"
    reward = (
        "\n\ndef brevity_reward(completions, **kwargs):\n    return [1 / (1 + len(_text(it))) for it in completions]\n"
    )
    copy.edit("src/utils/rewards.py", end, end + reward)
    copy.edit("src/train.py", '"format": format_reward}', '"format": format_reward, "brevity": brevity_reward}')
    copy.edit("src/train.py", "import accuracy_reward, format", "import accuracy_reward, brevity_reward, format")


def add_style(copy: Copy) -> None:
    first = '        Style("choice"'
    toy = '        Style("shout", " Shout the answer!", re.compile(".*!", re.DOTALL), "{}!".format),\n'
    copy.edit("src/dataset/prompt.py", first, toy + first)


def add_benchmark(copy: Copy) -> None:
    path = "src/dataset/questions.py"
    copy.edit(path, '"mmar": "MMAR"}', '"mmar": "MMAR", "toy": "Toys"}')
    name = '    if any("modality" in record'
    copy.edit(path, name, '    if all("toy" in record for record in records):\n        return "toy"\n' + name)
    known = '    if "question_text" in record:\n'
    copy.edit(path, known, '    if "ask" in record:\n        record = _from_toy(record)\n' + known)
    copy.edit(
        path,
        "\n\ndef _clip_key",
        '\n\ndef _from_toy(record):\n    asked = {"question": record["ask"], "choices": record["options"]}\n'
        '    group = {"task": "sound", "difficulty": "easy", "sub-category": "any"}\n'
        '    return {"id": record["toy"], "audio_id": record["wav"], "answer": record["key"], "toy": True} | asked | group\n'
        "\n\ndef _clip_key",
    )


def write_toys(folder: Path) -> Path:
    rows = [
        {"toy": f"t{i}", "wav": f"{i}.wav", "ask": "What?", "options": ["dog", "cat"], "key": "dog"} for i in range(4)
    ]
    (folder / "toys.json").write_text(json.dumps(rows))
    return folder / "toys.json"


@pytest.mark.parametrize(
    ("what", "add"), [("a reward", add_reward), ("a prompt style", add_style), ("a benchmark", add_benchmark)]
)
def test_what_is_listed_is_what_it_takes(tmp_path, what, add):
    """That it is enough is the next test's."""
    copy = Copy(tmp_path)
    add(copy)
    assert copy.touched == set(listed(what))


def replace_model(copy: Copy) -> None:
    """Another file in place of Qwen2-Audio's, which is gone: its encoder has another name, by which it is frozen."""
    name, encoding, command = listed("a model")
    assert (name, encoding) == ("src/model/NAME.py", "src/dataset/encode.py")
    files = run("sh", "-c", command, cwd=copy.folder).stdout.split()
    own = copy.folder / "src" / "model" / "qwen2_audio.py"
    text = own.read_text(encoding="utf-8")
    assert text.count('"audio_encoder"') == 1
    own.with_name("toy.py").write_text(text.replace('"audio_encoder"', '"ears"'), encoding="utf-8")
    own.unlink()
    for path in [copy.folder / file for file in files if "__pycache__" not in file]:
        if path != own:
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub(r"qwen2_audio(?= import)", "toy", text), encoding="utf-8")


@pytest.mark.slow
def test_toys_of_all_are_trained_evaluated_and_shown(preloaded, small_model, questions, tmp_path):
    copy, out = Copy(tmp_path), tmp_path / "out"
    for add in (add_reward, add_style, add_benchmark, replace_model):
        add(copy)
    copy.run(
        preloaded, "src/train.py", "--use_cpu", "true", "--max_steps", "1", "--questions_per_step", "2", "--num_generations", "2",
        "--max_completion_length", "4", "--model_name_or_path", small_model, "--data_file", questions, "--output_dir", out,
        "--reward_funcs", "accuracy", "brevity", "--prompt_style", "shout", "--freeze", "ears",
    )  # fmt: skip
    logged = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert 0 < logged["rewards/brevity_reward/mean"] <= 1
    assert json.loads((out / "checkpoint-1" / "prompt_style.json").read_text()) == {"prompt_style": "shout"}
    toys = write_toys(questions.parent)
    copy.run(
        preloaded,
        "src/test_mmau.py",
        "--model_path",
        out / "checkpoint-1",
        "--data_file",
        toys,
        "--max_new_tokens",
        "4",
    )
    (record,) = out.glob("test_1/run_toy_*.json")
    assert json.loads(record.read_text())["prompt"].endswith("['CHOICE', 'CHOICE']. Shout the answer!")
    table = copy.run(preloaded, "src/utils/show_acc.py", "-i", out)
    assert "Toys, 4 questions" in table and "(4)" in table
    scripts = "import ask, demo, merge_lora, train_sft, trainer.memory"  # that do without Qwen2-Audio's file as well
    copy.run(preloaded, "-c", f"import sys; sys.path.insert(0, 'src'); {scripts}")
