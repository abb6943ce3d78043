"""How far the fast way is from the slow one on this machine's device, in figures.

    python benchmarks/correctness.py --json checks.json      prints ok or FAILED for each check; exits 1 if one failed

The shared prompt against row by row (`tests/row_by_row.py`), log-probs and gradients in float32; in bfloat16 both
against float32. TRL's fused head against plain logits. Greedy rollouts, by each engine that is installed, against
`generate` on repeated rows. Steps under ZeRO-2 and ZeRO-3 on one process against steps without an engine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from trl.trainer.utils import add_fused_lm_head

from steps import (
    ENGINES,
    ROOT,
    SIZES,
    Settings,
    build,
    build_grpo,
    build_processor_of_30_seconds,
    close,
    make_questions,
    write_record,
)

# isort: split
import row_by_row
from dataset.audio import load_audio
from dataset.encode import Batch, encode
from model.qwen2_audio import as_attention_mask, needed_frames_only
from step_time import describe_machine, describe_settings
from tiny import build_demo_model, build_processor
from trainer.grpo_trainer import AudioGRPOTrainer
from trainer.shared_prompt import pack, score, unpack

ROUNDING = 1e-4  # in float32: of log-probs, whose size is about 10; of gradients and steps as a share
# How many times farther from float32 than row by row the shared prompt may be in bfloat16 (root mean square).
AS_GOOD = 1.25
Check = tuple[str, float, float]  # name, difference, largest difference allowed


def shared_prompt(model, batch: Batch, ids: torch.Tensor) -> torch.Tensor:
    """(N, G, C) log-probs as the trainer computes them."""
    packed = pack(batch.input_ids, batch.attention_mask, ids, torch.ones_like(ids))
    return unpack(score(model, model, packed, batch.audio_inputs).log_probs, packed, *ids.shape[1:])


def by_rows(model, batch: Batch, ids: torch.Tensor) -> torch.Tensor:
    return row_by_row.log_probs(model, row_by_row.as_inputs(batch), ids, torch.ones_like(ids))


def run(way: Callable, model, batch: Batch, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and, as one vector, the gradient of a weighted sum of them, in float32."""
    model.zero_grad()
    values = way(model, batch, ids).float()
    (values * torch.linspace(-1, 1, values.numel(), device=values.device).view(values.shape)).sum().backward()
    gradients = [weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None]
    return values.detach(), torch.cat(gradients)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of the expected norm."""
    return float((found - expected).norm() / expected.norm())


def check_passes(model, batch: Batch, ids: torch.Tensor) -> Iterator[Check]:
    """`model` is in float32."""
    (rows, slopes), (fast, fast_slopes) = (run(way, model, batch, ids) for way in (by_rows, shared_prompt))
    yield "shared prompt, float32: log-probs", float((fast - rows).abs().max()), ROUNDING
    yield "shared prompt, float32: gradients", distance(fast_slopes, slopes), ROUNDING
    coarse = deepcopy(model).to(torch.bfloat16)
    del coarse.forward  # the copy's head calls the original
    add_fused_lm_head(coarse)
    (coarse_rows, coarse_slopes), (shared, shared_slopes) = (
        run(way, coarse, batch, ids) for way in (by_rows, shared_prompt)
    )
    off, slopes_off = distance(coarse_rows, rows), distance(coarse_slopes, slopes)
    yield "shared prompt, bfloat16: log-probs", distance(shared, rows), AS_GOOD * off
    yield "shared prompt, bfloat16: gradients", distance(shared_slopes, slopes), AS_GOOD * slopes_off


@torch.no_grad()
def check_head(model, batch: Batch, ids: torch.Tensor) -> Iterator[Check]:
    """TRL's fused head, a Triton kernel on GPUs, on a packed row."""
    packed = pack(batch.input_ids, batch.attention_mask, ids, torch.ones_like(ids))
    fused = score(model, model, packed, batch.audio_inputs)
    with needed_frames_only(model):
        logits = model(
            input_ids=packed.input_ids,
            attention_mask=as_attention_mask(packed.sees, model.config),
            position_ids=packed.position_ids,
            **batch.audio_inputs,
        ).logits[:, -packed.labels.shape[1] :]
    plain = logits.log_softmax(dim=-1)
    expected = plain.gather(2, packed.labels[..., None])[..., 0]
    yield "fused head, float32: log-probs", float((fused.log_probs - expected).abs().max()), ROUNDING
    entropy = -(plain.exp() * plain).sum(dim=-1)
    yield "fused head, float32: entropy", float((fused.entropy - entropy).abs().max()), ROUNDING


def check_rollouts(trainer: AudioGRPOTrainer, engine: str) -> Iterator[Check]:
    """Greedy rollouts; the trainer's model is in float32."""
    rows = [trainer.train_dataset[i] for i in range(trainer.args.questions_per_step)]
    config = deepcopy(trainer.generation_config)  # does not hold vLLM's settings
    config.do_sample, config.min_new_tokens = False, trainer.max_completion_length
    trainer.model.train()
    rollout = trainer.roll_out(rows)
    inputs = row_by_row.as_inputs(rollout.questions)
    expected = row_by_row.generate(trainer.model, inputs, trainer.num_generations, generation_config=config)
    different = float((rollout.ids.flatten(0, 1) != expected).float().mean())
    yield f"rollouts, {engine}, greedy, float32: share of tokens that differ", different, 0.0


def check_engines(folder: Path, on_gpu: bool) -> Iterator[Check]:
    """Two steps of `tests/train_on_fixed_completions.py`, under ZeRO and without."""
    text = "What is in the audio? ['dog', 'cat', 'bell'] <answer>dog</answer>"
    build_demo_model(folder / "model", build_processor([text], seconds=30, mel_bins=128), initializer_range=0.2)
    question = {"question_text": "What is in it?", "multi_choice": ["dog", "cat", "bell"], "dataset_name": "AVQA"}
    rows = [question | {"id": i, "answer": i % 3, "audio_path": "0.wav"} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    taken = {}
    for engine in ("", "conf/ds_zero2.json", "conf/ds_zero3.json"):
        out, log = folder / f"out-{Path(engine).stem}", folder / "log.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        command += ["tests/train_on_fixed_completions.py", folder / "model", folder / "train.jsonl", out, engine, log]
        device = {"FIXED_COMPLETIONS_ON_GPU": "1"} if on_gpu else {}
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=os.environ | device, capture_output=True, text=True
        )
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-6000:], sep="\n", file=sys.stderr)
            yield f"{engine or 'no engine'}, one process: it ran", float("inf"), 0.0
            continue
        steps = json.loads(log.read_text())
        taken[engine] = torch.tensor([[step[key] for key in ("loss", "kl", "grad_norm")] for step in steps])
        if engine and "" in taken:
            yield f"{engine}, one process, float32: two steps", distance(taken[engine], taken[""]), 10 * ROUNDING


def check_all(settings: Settings, folder: Path) -> Iterator[Check]:
    processor = build_processor_of_30_seconds()
    rows = make_questions(folder, settings, processor, steps=1)
    model = build(settings, processor)
    for engine in ENGINES:
        trainer = build_grpo(
            AudioGRPOTrainer,
            replace(settings, engine=engine),
            model,
            deepcopy(model),
            rows,
            processor,
            folder,
            greedy=True,
        )
        yield from check_rollouts(trainer, engine)
        close(trainer)
    asked = rows[: settings.questions]
    batch = encode(processor, asked["prompt"], [load_audio(path) for path in asked["audio_path"]]).to(settings.device)
    shape = settings.questions, settings.generations, settings.completion
    plain = set(range(len(processor.tokenizer))) - set(processor.tokenizer.all_special_ids)
    ids = torch.tensor(sorted(plain))[torch.randint(len(plain), shape)].to(settings.device)
    yield from check_head(model, batch, ids)
    yield from check_passes(model, batch, ids)
    yield from check_engines(folder, settings.device.type == "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description="How far the fast way is from the slow one, on this device.")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the model, which has random weights")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if on_gpu else "cpu"))
    parser.add_argument("--json", type=Path, help="also write the record to this file")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # else convolutions in float32 round to TF32
    settings = Settings(size=args.size, generations=4, device=args.device)
    checks = []
    with tempfile.TemporaryDirectory() as folder:
        for what, found, limit in check_all(settings, Path(folder)):
            checks.append({"what": what, "found": found, "limit": limit, "ok": found <= limit})
            print(f"{'ok' if found <= limit else 'FAILED':<7}{what}: {found:.2g}, at most {limit:.2g}", flush=True)
    if args.json:
        about = {"settings": describe_settings(settings), "machine": describe_machine(args.device)}
        write_record(args.json, about | {"checks": checks})
    sys.exit(not all(check["ok"] for check in checks))


if __name__ == "__main__":
    main()
