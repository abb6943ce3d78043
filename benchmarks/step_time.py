"""Policy pass (log-probs, loss, gradients) of one question, in one run: row by row; with the shared prompt; and with
the encoder on the frames that hold audio, too, as training does it.

    python benchmarks/step_time.py                      a small model of random weights, on a CPU
    python benchmarks/step_time.py --model FOLDER       a model of yours, on a GPU with --device cuda --dtype bfloat16

A 10 s clip (250 audio tokens), 60 tokens of text, G completions of C tokens. Prints the median of the timed passes, and
how far the two ways' log-probs are apart. Row by row is `tests/row_by_row.py`, which the tests hold ours to.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch
from transformers import Qwen2AudioForConditionalGeneration
from trl.trainer.utils import add_fused_lm_head

import row_by_row
from model.tiny import build_model, build_processor
from trainer import shared_prompt
from trainer.grpo_trainer import AUDIO_INPUTS
from trainer.shared_prompt import pack, score, unpack

AUDIO_TOKENS, FRAMES, TEXT_TOKENS = 250, 1000, 60


def build_small() -> Qwen2AudioForConditionalGeneration:
    """About 70 M parameters, the real 30 s window, a vocabulary of 32,000."""
    processor = build_processor([], mel_bins=128, seconds=30)
    processor.tokenizer.add_tokens([f"word {number}" for number in range(32_000 - len(processor.tokenizer))])
    audio = {"audio_size": 384, "audio_layers": 6, "audio_heads": 6}
    return build_model(processor, **audio, hidden_size=512, layers=8, heads=8, initializer_range=0.02)


def make_question(model, generations: int, length: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """(prompt tensors of one question, completion ids and mask (1, G, C)), drawn at random."""
    config, device = model.config, model.device
    text = torch.randint(10, 1000, (1, TEXT_TOKENS))  # no special token of the small model
    audio = torch.full((1, AUDIO_TOKENS), config.audio_token_id)
    prompt = torch.cat([text[:, :20], audio, text[:, 20:]], dim=1)
    window = config.audio_config.max_source_positions * 2
    prompts = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "input_features": torch.randn(1, config.audio_config.num_mel_bins, window, dtype=model.dtype),
        "feature_attention_mask": (torch.arange(window) < FRAMES).long()[None],
    }
    ids = torch.randint(10, 1000, (1, generations, length), device=device)
    return {key: value.to(device) for key, value in prompts.items()}, ids, torch.ones_like(ids)


def shared_log_probs(model, prompts: dict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(1, G, C) log-probs as the trainer computes them."""
    packed = pack(prompts["input_ids"], prompts["attention_mask"], ids, mask)
    outputs = score(model, model, packed, {key: prompts[key] for key in AUDIO_INPUTS})
    return unpack(outputs.log_probs, packed, ids.shape[1], ids.shape[2]).view(ids.shape)


def shared_log_probs_of_whole_windows(model, prompts: dict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same with the model's own encoder pass, which takes nothing but 30 s."""
    with patch.object(shared_prompt, "needed_frames_only", nullcontext):
        return shared_log_probs(model, prompts, ids, mask)


def measure(log_probs, model, question, repeats: int) -> tuple[float, torch.Tensor]:
    """(median seconds of a forward and backward pass, log-probs); the first pass is not timed."""
    seconds = []
    for _ in range(repeats + 1):
        model.zero_grad()
        start = time.perf_counter()
        values = log_probs(model, *question)
        values.sum().backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), values.detach().float()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the policy pass of one question, three ways.")
    parser.add_argument("--model", help="folder of a Qwen2-Audio; default: a small one of random weights")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--length", type=int, default=16, help="tokens of each completion")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(args.model) if args.model else build_small()
    model = model.to(args.device, getattr(torch, args.dtype)).train()
    add_fused_lm_head(model)
    question = make_question(model, args.generations, args.length)
    slow, expected = measure(row_by_row.log_probs, model, question, args.repeats)
    whole, _ = measure(shared_log_probs_of_whole_windows, model, question, args.repeats)
    fast, found = measure(shared_log_probs, model, question, args.repeats)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{size:.0f} M parameters, {args.dtype}, {args.device}, {torch.get_num_threads()} threads, "
        f"G = {args.generations}, {args.length} tokens"
    )
    print(f"row by row                     {slow:.3f} s")
    for name, seconds in (("shared prompt, whole windows", whole), ("shared prompt, needed frames", fast)):
        print(f"{name:<29}  {seconds:.3f} s, {slow / seconds:.1f} times as fast")
    print(f"log-probs differ by at most {(found - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
