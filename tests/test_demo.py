"""The demo's data, its model and its warm start; GRPO on them is `sh run_grpo.sh demo`."""

import json
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from transformers import AutoProcessor, GenerationConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from transformers.models.whisper.modeling_whisper import sinusoids

import row_by_row
import warm_start as demo
from conftest import ROOT
from dataset.audio import SAMPLE_RATE, count_samples, load_audio
from dataset.dataset import load_train_dataset
from dataset.encode import build_chat, count_audio_tokens
from dataset.prompt import build_question, extract_answer, load_style
from dataset.questions import load_questions
from dataset.rows import read_records
from evaluation.collect import read_results
from make_demo import (
    MMAU_FILE,
    SHIFTED_FILE,
    SOUNDS,
    TRAIN_FILE,
    UNNAMED,
    WARM_START_FILE,
    make_demo,
    synthesise,
)
from run.check import Rules, examine_training_file
from running import run
from tiny import IM_END, SPECIAL_TOKENS, build_demo_model, build_processor, build_tokenizer
from warm_start import SFT, UNTRAINED, WARM_START, prepare

COUNTS = dict(warm_start=33, train=22, test=22, shifted=26)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo") / "data", **COUNTS, seed=1)


@pytest.fixture(scope="module")
def rows(data) -> Dataset:
    return load_train_dataset(data / WARM_START_FILE)


@pytest.fixture(scope="module")
def built(rows, tmp_path_factory):
    """(folder, model, processor) of the demo's own model."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    processor = build_processor([*rows["prompt"], *rows["solution"]])
    return folder, build_demo_model(folder, processor, seed=1), processor


# Data


@pytest.mark.parametrize("name, count", [(WARM_START_FILE, COUNTS["warm_start"]), (TRAIN_FILE, COUNTS["train"])])
def test_training_files_are_avqa_rows_that_the_loader_takes(data, name, count):
    dataset = load_train_dataset(data / name)
    assert len(dataset) == count
    for record, row in zip(read_records(data / name), dataset, strict=True):
        answer = record["multi_choice"][record["answer"]]
        assert extract_answer(row["solution"]) == answer and answer in SOUNDS
        assert len(set(record["multi_choice"])) == 4
        assert "video" in record["question_text"] and "video" not in row["prompt"]
        assert record["video_name"].startswith(record["audio_path"].removeprefix("wavs/").removesuffix("_0.wav"))
        clip = load_audio(row["audio_path"])
        assert 1.0 <= len(clip) / SAMPLE_RATE <= 2.0 and 0.1 < abs(clip).max() < 1


def test_held_out_file_is_a_benchmark_in_mmau_format(data):
    benchmark = load_questions(data / MMAU_FILE)
    assert benchmark.name == "mmau_mini" and benchmark.has_answers and len(benchmark.questions) == COUNTS["test"]
    tasks, answers = Counter(), Counter()
    for question in benchmark.questions:
        record = question.record
        assert record["answer"] in record["choices"] and len(set(record["choices"])) == 4
        assert record["audio_id"] == f"./test-mini-audios/{record['id']}.wav"
        assert count_samples(question.audio_path) > 0
        assert record["task"] == SOUNDS[record["answer"]][0]
        tasks[record["task"]] += 1
        answers[record["answer"]] += 1
    assert set(tasks) == {"sound", "music", "speech"}
    assert set(answers.values()) == {COUNTS["test"] // len(SOUNDS)}, "every sound in equal shares"


def test_shifted_questions_are_away_from_the_trainings_in_every_respect(data):
    shifted = load_questions(data / SHIFTED_FILE)
    assert shifted.name == "mmau_shifted" and not shifted.faults and len(shifted.questions) == COUNTS["shifted"]
    trained = [row for name in (WARM_START_FILE, TRAIN_FILE) for row in read_records(data / name)]
    assert not {row["question_text"] for row in trained} & {q.record["question"] for q in shifted.questions}
    assert not {choice for row in trained for choice in row["multi_choice"]} & set(UNNAMED)
    assert Counter(q.record["answer"] for q in shifted.questions) == dict.fromkeys([*SOUNDS, *UNNAMED], 2)
    sizes = {len(q.record["choices"]) for q in shifted.questions}
    assert min(sizes) == 2 and max(sizes) == 8 and len(sizes) > 4
    infos = [soundfile.info(q.audio_path) for q in shifted.questions]
    assert SAMPLE_RATE not in {info.samplerate for info in infos} and max(info.duration for info in infos) <= 2
    peaks = [abs(load_audio(q.audio_path)).max() for q in shifted.questions]
    assert min(peaks) < 0.12 and max(peaks) > 0.9, "fainter, and louder"


def test_training_and_held_out_questions_read_alike_and_share_no_clip(data):
    trained = {row["question_text"].replace("video", "audio") for row in read_records(data / TRAIN_FILE)}
    asked = {record["question"] for record in json.loads((data / MMAU_FILE).read_text())}
    assert asked <= trained
    clips = [path.read_bytes() for path in data.rglob("*.wav")]
    assert len(clips) == sum(COUNTS.values()) and len(set(clips)) == len(clips)


def test_data_is_decided_by_the_seed(data, tmp_path):
    def contents(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    again = contents(make_demo(tmp_path / "again", **COUNTS, seed=1))
    assert again == contents(data)
    other = contents(make_demo(tmp_path / "other", **COUNTS, seed=2))
    assert other[TRAIN_FILE] != again[TRAIN_FILE] and other["wavs/demo0000001_0.wav"] != again["wavs/demo0000001_0.wav"]


def test_data_is_written_whole_over_an_old_one_and_over_nothing_else(tmp_path):
    counts = dict(warm_start=1, train=1, test=1, shifted=1)
    out = make_demo(tmp_path / "demo", warm_start=2, train=2, test=2, shifted=2)
    make_demo(out, **counts)
    assert len(list(out.rglob("*.wav"))) == 4 and list(tmp_path.iterdir()) == [out]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=str(precious)):
        make_demo(precious, **counts)
    with pytest.raises(ValueError, match="warm_start"):
        make_demo(out, warm_start=0)
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"] and (out / MMAU_FILE).is_file()


@pytest.mark.parametrize("name", SOUNDS)
def test_every_sound_differs_from_clip_to_clip(name):
    rng = np.random.default_rng(0)
    first, second = synthesise(name, rng), synthesise(name, rng)
    assert np.isfinite(first).all() and abs(first).max() < 1
    shorter = min(len(first), len(second))
    assert abs(np.corrcoef(first[:shorter], second[:shorter])[0, 1]) < 0.5


# Model


def test_the_folder_alone_loads_model_and_processor(built, rows):
    folder, model, processor = built
    loaded = Qwen2AudioForConditionalGeneration.from_pretrained(folder)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    again = AutoProcessor.from_pretrained(folder)
    assert isinstance(again, Qwen2AudioProcessor) and again.tokenizer.padding_side == "left"
    clips = [load_audio(path) for path in rows["audio_path"][:3]]
    before, after = (row_by_row.encode(p, rows["prompt"][:3], clips) for p in (processor, again))
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert load_style(folder) == "answer"


def test_same_ends_and_sampling_defaults_as_the_real_model(built):
    folder, model, processor = built
    tokenizer = processor.tokenizer
    saved = GenerationConfig.from_pretrained(folder)
    assert saved.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert saved.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (saved.do_sample, saved.top_k, saved.top_p, saved.temperature) == (True, 20, 0.5, 0.7)
    assert saved.repetition_penalty == 1.1
    assert tokenizer.eos_token == IM_END and model.config.audio_token_id == processor.audio_token_id
    assert len(tokenizer) == model.config.text_config.vocab_size


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0, 1.37, 2.0])
def test_audio_tokens_are_as_many_as_the_model_makes_of_the_clip(built, seconds):
    _, model, processor = built
    clip = np.random.default_rng(0).normal(scale=0.1, size=round(seconds * SAMPLE_RATE)).astype(np.float32)
    inputs = row_by_row.encode(processor, ["What is it?"], [clip])
    tokens = int((inputs["input_ids"] == processor.audio_token_id).sum())
    assert tokens == count_audio_tokens(len(clip))
    with torch.no_grad():
        logits = model(**inputs).logits  # raises where tokens and features differ
    assert logits.shape == (*inputs["input_ids"].shape, len(processor.tokenizer)) and logits.isfinite().all()


def test_positions_are_whispers_sinusoids_and_frozen(tmp_path):
    model = build_demo_model(tmp_path / "model", build_processor(["text"]), audio_size=16, hidden_size=32)
    embedding = model.model.audio_tower.embed_positions.weight
    assert not embedding.requires_grad and embedding.shape == (100, 16)
    position, channel = 7, 3  # sin(p / 10000^(c / 7)), then cos
    angle = torch.tensor(position / 10_000 ** (channel / 7))
    assert embedding[position, channel].item() == pytest.approx(angle.sin().item(), abs=1e-6)
    assert embedding[position, 8 + channel].item() == pytest.approx(angle.cos().item(), abs=1e-6)
    assert torch.allclose(embedding, sinusoids(100, 16), atol=1e-6)


def test_sizes_and_seed_are_the_callers(tmp_path):
    processor = build_processor(["text"], vocab_size=300, mel_bins=80, seconds=3)
    model = build_demo_model(
        tmp_path / "a", processor, seed=3, audio_size=32, audio_layers=1, audio_heads=2, hidden_size=48, layers=3,
        heads=2, style="think",
    )  # fmt: skip
    audio, text = model.config.audio_config, model.config.text_config
    assert (audio.num_mel_bins, audio.d_model, audio.encoder_layers, audio.max_source_positions) == (80, 32, 1, 150)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (48, 3, 2)
    assert len(processor.tokenizer) <= 300 and processor.feature_extractor.n_samples == 3 * SAMPLE_RATE
    assert load_style(tmp_path / "a") == "think"
    weights = []
    for seed in (3, 3, 4):
        other = build_demo_model(tmp_path / "b", processor, seed=seed, hidden_size=32, audio_size=16)
        weights.append(other.lm_head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    "text",
    ["", " ", "naïve façade", "Здравствуй, мир", "狗在叫 🐕‍🦺\n\n\ttabs", "a\u0000b", "<answer>x</answer>", "1234 ½"],
)
def test_any_text_can_be_encoded_and_comes_back(built, text):
    tokenizer = built[2].tokenizer
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.unk_token_id not in ids


def test_special_tokens_are_one_id_each_and_not_learned_from():
    tokenizer = build_tokenizer([f"{token}word" for token in SPECIAL_TOKENS] * 5)
    for token in SPECIAL_TOKENS:
        assert tokenizer.convert_ids_to_tokens(tokenizer(f"word{token}word")["input_ids"]) == ["word", token, "word"]
    assert not any("AUDIO" in token for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS)


def test_chat_is_worded_as_the_real_models(built):
    text = build_question("What is it?", ["a", "b"])
    assert build_chat(built[2], text) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_renders_what_the_real_one_renders(built, shared):
    template = json.loads((shared / "models/qwen2-audio-7b-no-weights/chat_template.json").read_text())["chat_template"]
    audio, words = {"type": "audio", "audio_url": "x"}, {"type": "text", "text": "Hm?"}
    conversations = [
        [{"role": "user", "content": [audio, words]}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [audio, words, audio]}],
        [
            {"role": "user", "content": [words]},
            {"role": "assistant", "content": "Ah."},
            {"role": "user", "content": "?"},
        ],
    ]
    for messages in conversations:
        for prompt in (True, False):
            ours, real = (
                built[2].apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, chat_template=t)
                for t in (built[2].chat_template, template)
            )
            assert ours == real


# Warm start, and the whole demo


def test_every_row_of_the_demo_can_be_trained_on(built, data):
    examination = examine_training_file(data / TRAIN_FILE, Rules("answer", built[2], max_prompt_length=150))
    assert not examination.dropped and examination.usable == COUNTS["train"]


@pytest.mark.slow
def test_the_warm_start_learns_and_ends_at_its_target(data, tmp_path, capfd):
    def losses() -> list[float]:
        return [float(loss) for loss in re.findall(r"warm start: step \d+, loss ([\d.]+)", capfd.readouterr().out)]

    assert prepare(data, tmp_path, seed=1, max_steps=15, target_loss=0.0) == 15
    first, *_, last = losses()
    assert last < first / 3
    assert prepare(data, tmp_path, seed=1, max_steps=15, target_loss=9.0) == 5, "the mean of five losses decides"
    assert len(losses()) == 1
    start, model = (
        Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / name) for name in (UNTRAINED, WARM_START)
    )
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert torch.equal(*(m.model.audio_tower.embed_positions.weight for m in (start, model)))
    assert load_style(tmp_path / WARM_START) == "answer"
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / WARM_START), Qwen2AudioProcessor)


@pytest.mark.slow
def test_the_seed_decides_the_warm_start(data, tmp_path):
    weights = []
    for seed in (1, 1, 2):
        prepare(data, tmp_path, seed=seed, max_steps=2, target_loss=0.0)
        weights.append((tmp_path / WARM_START / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_only_what_an_earlier_demo_left_is_removed(data, tmp_path, monkeypatch):
    out = tmp_path / "exp"
    flags = ["--data", data, "--out", out, "--max_steps", 1]
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, flags)])
    for folder in ("checkpoint-7", "test_7", "precious"):
        (out / folder).mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"demo: {out}"):
        demo.main()
    assert (out / "checkpoint-7").is_dir()
    (out / UNTRAINED).mkdir()
    demo.main()
    assert sorted(path.name for path in out.iterdir()) == ["precious", UNTRAINED, WARM_START]


def test_a_demo_that_was_not_run_is_named(tmp_path):
    done = run("sh", "test_mmau.sh", "demo", check=False, OUT_DIR=tmp_path)
    assert done.returncode == 1 and "run_grpo.sh demo" in done.stdout


@pytest.mark.slow
def test_the_table_names_every_model_but_an_incomplete_one(data, tmp_path):
    """The second time, finished evaluations are skipped."""
    prepare(data, tmp_path, seed=1, max_steps=1, target_loss=0.0)
    for name in (SFT, "checkpoint-20", "checkpoint-100"):
        shutil.copytree(tmp_path / WARM_START, tmp_path / name)
    (tmp_path / "checkpoint-5").mkdir()
    command = dict(OUT_DIR=tmp_path, MMAU_DIR=data, GPU_NUM=1)
    done = run("sh", "test_mmau.sh", "demo", check=False, **command)
    assert done.returncode == 3
    title = f"questions in MMAU's format, {COUNTS['test']} questions"
    tables = done.stdout[done.stdout.rindex(title) :].split("\n\n")
    head, *rows = tables[0].splitlines()[2:]
    assert "format (shifted)" in tables[1]
    assert head.split()[:5] == ["step", "sound", "music", "speech", "total"]
    assert {row.split()[0] for row in rows if "%" not in row} >= {UNTRAINED, WARM_START, SFT, "20", "100"}
    scores = {tuple(row.split()[1:9]) for row in rows if row.split()[0] in (WARM_START, SFT, "20", "100")}
    assert len(scores) == 1, "the same weights, the same scores"
    results = {path: path.stat().st_mtime_ns for path in tmp_path.glob("test_*/*.json")}
    assert len(results) >= 10 and not list(tmp_path.glob("test_5/*.json"))
    run("sh", "test_mmau.sh", "demo", check=False, **command)
    assert results == {path: path.stat().st_mtime_ns for path in tmp_path.glob("test_*/*.json")}


@pytest.mark.slow
def test_the_whole_demo_adds_ten_points(tmp_path):
    for name in (
        "run_grpo.sh",
        "test_mmau.sh",
        "paths.sh",
        "setup_env.sh",
        "launch.sh",
        "data",
        "demo",
        "src",
        "requirements.txt",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("demo", "AVQA", "MMAU"))
        else:
            shutil.copy(source, tmp_path / name)
    run("sh", "run_grpo.sh", "demo", cwd=tmp_path, timeout=1800, OMP_NUM_THREADS=2)
    out = tmp_path / "exp" / "demo"
    assert (out / "training.png").is_file() and "(shifted)" in (out / "report.html").read_text(encoding="utf-8")
    results, _ = read_results(out)
    shifted = [result for result in results if result.benchmark.name == "mmau_shifted"]
    totals = {result.label: result.accuracy for result in results if result not in shifted}
    assert {result.label for result in shifted} == set(totals)
    assert set(totals) == {UNTRAINED, WARM_START, SFT, "50", "100", "150", "200"}
    assert totals[UNTRAINED] < 10 and 20 < totals[WARM_START] < 80
    assert totals["200"] > totals[WARM_START] + 10 and totals[SFT] > totals[WARM_START] + 10
