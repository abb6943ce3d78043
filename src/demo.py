"""The demo's own parts: a small Qwen2-Audio from nothing, its supervised warm start, and the closing table.

    python src/demo.py prepare --data data/demo --out exp/demo --seed 1    makes exp/demo/untrained, exp/demo/warm_start
    python src/demo.py table --data data/demo --out exp/demo               scores those two and exp/demo/checkpoint-*

The model is a real `Qwen2AudioForConditionalGeneration` with a real `Qwen2AudioProcessor`: less than a million
parameters, a vocabulary of its own, a window of 2 s, built without any network. `build_demo_model` serves the tests
too. GRPO itself is not here: it runs through `src/train.py`, as for the real model.

Shapes: N questions, T tokens (prompt and answer), M mel bins, F mel frames.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from transformers.utils import logging

from dataset.audio import load_audio
from dataset.dataset import load_train_dataset
from dataset.encode import encode
from dataset.prompt import DEFAULT_STYLE
from model.checkpoints import label_of
from model.qwen2_audio import needed_frames_only
from model.tiny import IM_END, build_demo_model, save
from test_mmau import parse_args, run_sweep
from utils.show_acc import Result, read_results, table_rows

UNTRAINED, WARM_START, SFT = "untrained", "warm_start", "sft"  # folders below the demo's output
MAX_WARM_START_STEPS = 80
TARGET_LOSS = 0.25  # nats per answer token; 0.4 is the right shape and a random word, 0 is a finished model
SMOOTHED = 5  # steps over which the warm start's loss is averaged
MAX_NEW_TOKENS = 16  # an answer has 6


# Warm start


def encode_with_answers(processor: Qwen2AudioProcessor, dataset: Dataset) -> dict[str, torch.Tensor]:
    """All questions of a data set with their answers, encoded once.

    Args:
        processor: the model's.
        dataset: as `load_train_dataset` makes it, N rows.

    Returns:
        The model's inputs: `input_ids`, `attention_mask` and `labels` (N, T), `input_features` (N, M, F),
        `feature_attention_mask` (N, F). Labels are -100 but for `<answer>...</answer><|im_end|>`.
    """
    clips = [load_audio(path) for path in dataset["audio_path"]]
    questions = encode(processor, list(dataset["prompt"]), clips)
    answers = processor.tokenizer(
        [solution + IM_END for solution in dataset["solution"]],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    prompt_labels = torch.full_like(questions.input_ids, -100)
    answer_labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
    return {
        "input_ids": torch.cat([questions.input_ids, answers["input_ids"]], dim=1),
        "attention_mask": torch.cat([questions.attention_mask, answers["attention_mask"]], dim=1),
        "labels": torch.cat([prompt_labels, answer_labels], dim=1),
    } | questions.audio_inputs


def warm_start(
    model: Qwen2AudioForConditionalGeneration,
    rows: dict[str, torch.Tensor],
    max_steps: int = MAX_WARM_START_STEPS,
    target_loss: float = TARGET_LOSS,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 1,
    log_every: int = 5,
) -> list[float]:
    """A plain supervised loop: AdamW at a constant rate, gradients clipped to norm 1, loss on the answers alone.

    It ends at a loss, not at a step: with some seeds the model starts to listen ten steps later than with others, and
    it is to be neither deaf nor finished when GRPO takes over.

    Args:
        model: trained in place.
        rows: as `encode_with_answers` makes them.
        max_steps: where to end at the latest.
        target_loss: ends once the mean of the last `SMOOTHED` losses is down to this.
        batch_size, learning_rate: of AdamW.
        seed: decides the order of the rows.
        log_every: steps between two lines of progress; 0 for none.

    Returns:
        The loss of each step, in nats per answer token.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, betas=(0.9, 0.95))
    losses, start = [], time.monotonic()
    model.train()
    for picked in _batches(len(rows["input_ids"]), batch_size, max_steps, seed):
        with needed_frames_only(model):
            loss = model(**{key: value[picked] for key, value in rows.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        recent = losses[-SMOOTHED:]
        ended = len(losses) == max_steps or (len(losses) >= SMOOTHED and sum(recent) / SMOOTHED <= target_loss)
        if log_every and (ended or len(losses) % log_every == 0):
            mean, seconds = sum(recent) / len(recent), time.monotonic() - start
            print(f"warm start: step {len(losses)}, loss {mean:.3f} (until {target_loss}), {seconds:.0f} s", flush=True)
        if ended:
            break
    return losses


def _batches(count: int, batch_size: int, batches: int, seed: int) -> Iterator[torch.Tensor]:
    """`batches` x indices of `batch_size` rows of `count`, reshuffled whenever all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(batches):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch_size]
        order = order[batch_size:]


def prepare(data: Path, out: Path, seed: int, max_steps: int, target_loss: float) -> None:
    """Build the model and warm it up: `out`/untrained and `out`/warm_start. What an earlier demo left there goes.

    Raises:
        FileNotFoundError: there is no demo data.
        ValueError: `out` holds checkpoints that are not a demo's.
    """
    dataset = load_train_dataset(data / "warm_start.jsonl")
    if any(out.glob("checkpoint-*")) and not (out / UNTRAINED).is_dir():
        raise ValueError(f"{out}: holds checkpoints that are not the demo's, so it is left alone; choose another --out")
    for pattern in (UNTRAINED, WARM_START, SFT, "checkpoint-*", "test_*"):
        for folder in out.glob(pattern):
            shutil.rmtree(folder)
    model, processor = build_demo_model(out / UNTRAINED, [*dataset["prompt"], *dataset["solution"]], seed=seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    words = len(processor.tokenizer)
    print(f"{out / UNTRAINED}: a Qwen2-Audio of {size / 1e6:.2f} M parameters, vocabulary {words}", flush=True)
    warm_start(model, encode_with_answers(processor, dataset), max_steps, target_loss, seed=seed)
    save(model, processor, out / WARM_START, DEFAULT_STYLE)
    print(f"{out / WARM_START}: saved", flush=True)


# Table


def score(data: Path, out: Path, batch_size: int = 64) -> list[Result]:
    """Evaluate every model of the demo on the held-out questions, with `test_mmau.py`.

    In this order: untrained, warm start, supervised fine-tuning if there was one, every checkpoint of GRPO.

    Returns:
        Their results, in this order.

    Raises:
        ValueError: there are no checkpoints, or one of the models has no result.
    """
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    if not checkpoints:
        raise ValueError(f"{out}: holds no checkpoint-*; run GRPO first, as `sh run_grpo.sh demo` does")
    supervised = [out / SFT] if (out / SFT).is_dir() else []
    folders = [out / UNTRAINED, out / WARM_START, *supervised, *checkpoints]
    flags = ["--data_file", str(data / "mmau_demo.json"), "--out_dir", str(out)]
    flags += ["--batch_size", str(batch_size), "--max_new_tokens", str(MAX_NEW_TOKENS), "--model_path"]
    run_sweep(parse_args(flags + [str(folder) for folder in folders]))
    found = {result.label: result for result in read_results(out)[0]}
    labels = [label_of(str(folder)) for folder in folders]
    if lacking := [label for label in labels if label not in found]:
        raise ValueError(f"{out}: no results of {', '.join(lacking)}; see above for the reason")
    return [found[label] for label in labels]


def format_table(results: list[Result]) -> str:
    """The closing table, and what GRPO added, of the results of `score`."""
    rows = table_rows(results)
    rows[0][0] = "accuracy in %"
    for row in rows[1:]:
        row[0] = f"GRPO, step {row[0]}" if row[0].isdecimal() else row[0].replace("_", " ").replace(SFT, "SFT")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    accuracy = {result.label: result.scores.accuracy for result in results}
    questions = results[0].scores.questions
    for name, label in (("SFT", SFT), ("GRPO", results[-1].label)):
        if label in accuracy:
            gain = accuracy[label] - accuracy[WARM_START]
            lines.append(f"{name}: {gain:+.1f} points over the warm start on {questions} held-out questions")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's model, its warm start, and its table.")
    parser.add_argument("command", choices=("prepare", "table"))
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="what data/make_demo.py wrote")
    parser.add_argument("--out", type=Path, default=Path("exp/demo"), help="models and results")
    parser.add_argument("--seed", type=int, default=1, help="prepare: decides weights and order")
    parser.add_argument(
        "--max_steps", type=int, default=MAX_WARM_START_STEPS, help="prepare: end the warm start here at the latest"
    )
    parser.add_argument("--target_loss", type=float, default=TARGET_LOSS, help="prepare: end it at this loss")
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        if args.command == "prepare":
            prepare(args.data, args.out, args.seed, args.max_steps, args.target_loss)
        else:
            print(format_table(score(args.data, args.out)))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
