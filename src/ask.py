"""Ask a model about one audio file.

    python src/ask.py --model_path exp/model/checkpoint-500 --audio clip.wav \
        --question "What makes the sound?" --choices dog cat bell car

Prints the answer, the completion as the model wrote it, and the probability of each choice: that the reply is exactly
this choice, in the shape that the prompt asks for, divided by the sum over the choices. With `--prompt_style think`
the choices come after the model's own thinking.
"""

import argparse
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads shall not spin

import torch
from transformers.utils import logging

from dataset.audio import SAMPLE_RATE, load_audio
from dataset.encode import encode
from dataset.prompt import DEFAULT_STYLE, STYLES, build_question, extract_answer, load_style
from model.checkpoints import check_whole, load_model, locate
from model.generation import MAX_NEW_TOKENS, generate, score
from model.qwen2_audio import end_ids, load_processor


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask Qwen2-Audio about one audio file.")
    add = parser.add_argument
    add("--model_path", required=True, help="folder or hub name")
    add("--audio", required=True, help="audio file in any common format")
    add("--question", required=True)
    add("--choices", required=True, nargs="+", help="the options, two or more")
    add("--prompt_style", choices=STYLES, help=f"prompt style; default: the checkpoint's own, else {DEFAULT_STYLE}")
    add("--start", type=float, help="hear a clip that is too long from this second on, for as long as the model can")
    add("--max_new_tokens", type=int, default=MAX_NEW_TOKENS)
    args = parser.parse_args(argv)
    if len(args.choices) < 2:
        parser.error("--choices needs at least two")
    return args


def cut_clip(path: str, start: float | None, window: int):
    """Decode a clip; from second `start` on, at most `window` samples of it.

    Raises:
        FileNotFoundError, ValueError: it cannot be decoded, is over the window without a `start`, or ends before it.
    """
    clip = load_audio(path)
    seconds, limit = len(clip) / SAMPLE_RATE, window / SAMPLE_RATE
    if start is None:
        if len(clip) > window:
            raise ValueError(f"{path} lasts {seconds:.2f} s, the model hears {limit:g} s; --start SECOND picks a part")
        return clip
    if not 0 <= start < seconds:
        raise ValueError(f"--start {start:g} is outside of {path}, which lasts {seconds:.2f} s")
    first = round(start * SAMPLE_RATE)
    return clip[first : first + window]


def ask(model, processor, clip, question: str, choices: list[str], style: str, max_new_tokens: int = MAX_NEW_TOKENS):
    """One question about one clip.

    Args:
        model, processor: as `load_model` and `load_processor` give them.
        clip: float32 of shape (samples,), 16 kHz.

    Returns:
        The completion, and the probability of each choice (they sum to 1).

    Raises:
        ValueError: the clip is too long or too short.
    """
    batch = encode(processor, [build_question(question, choices, style)], [clip]).to(model.device)
    ids = generate(model, batch, end_ids(processor), max_new_tokens)[0]
    tokenizer = processor.tokenizer
    completion = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    replies = [STYLES[style].reply(choice, completion) for choice in choices]
    # As token ids, each reply ends as the chat template ends a turn.
    reply_ids = [tokenizer(reply)["input_ids"] + [tokenizer.eos_token_id] for reply in replies]
    return completion, score(model, batch, reply_ids).softmax(dim=0).tolist()


def main() -> int:
    args = parse_args()
    logging.disable_progress_bar()
    try:
        folder = locate(args.model_path)
        check_whole(folder)
        processor = load_processor(folder)
        clip = cut_clip(args.audio, args.start, processor.feature_extractor.n_samples)
        style = args.prompt_style or load_style(folder) or DEFAULT_STYLE
        on_gpu = torch.cuda.is_available()
        dtype, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
        model = load_model(folder, dtype, torch.device(device))
        completion, probabilities = ask(model, processor, clip, args.question, args.choices, style, args.max_new_tokens)
    except (ValueError, FileNotFoundError) as error:
        print(f"ask: {error}", file=sys.stderr)
        return 1
    print(f"answer:     {extract_answer(completion)}")
    print(f"completion: {completion}")
    for probability, choice in sorted(zip(probabilities, args.choices, strict=True), reverse=True):
        print(f"{100 * probability:9.2f}%  {choice}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
