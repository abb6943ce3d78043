"""Ask a model about one audio file.

    python src/ask.py --model_path exp/model/checkpoint-500 --audio clip.wav \
        --question "What makes the sound?" --choices dog cat bell car

Prints the answer (marked if MMAU's score counts it for none of the choices), the completion, and each choice's
probability to be the whole reply in the shape that the prompt requires, divided by the sum over the choices. In style
`think` the choices follow the model's own thinking.
"""

import contextlib
import json
import os
import signal
import sys
from argparse import ArgumentParser, Namespace

if __name__ == "__main__":  # Ctrl-C exits at once, even during the imports
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"ask: interrupted\n"), os._exit(130)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads do not spin

import torch

from dataset.audio import CHANNELS, SAMPLE_RATE, load_audio
from dataset.dataset import check_choices
from dataset.encode import encode
from dataset.prompt import DEFAULT_STYLE, STYLES, build_question, extract_answer, load_style
from dataset.rows import DataError
from evaluation.checkpoints import check_model, load_model
from evaluation.decoding import Greedy, score
from evaluation.identity import locate
from evaluation.lengths import check_prompt, count_text_tokens
from evaluation.mmau import string_match
from evaluation.results import MAX_NEW_TOKENS
from model.generation import generate
from model.qwen2_audio import check_audio_token, end_ids, load_processor
from utils.flags import at_least
from utils.text import printable


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description="Ask Qwen2-Audio about one audio file.", allow_abbrev=False)
    add = parser.add_argument
    add("--model_path", required=True, help="folder or hub name")
    add("--audio", required=True, help="audio file in any common format")
    add("--question", required=True)
    add("--choices", required=True, nargs="+", help="the options, two or more")
    add("--prompt_style", choices=STYLES, help=f"prompt style; default: the checkpoint's own, else {DEFAULT_STYLE}")
    add("--audio_channels", choices=CHANNELS, default="first", help="channel(s) of the clip to use; paper: first")
    add("--start", type=float, help="use the clip from this second on, as much of it as the model takes")
    add("--max_new_tokens", type=at_least(1), default=MAX_NEW_TOKENS, help="longest completion")
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(argv)


def cut_clip(clip, start: float, window: int):
    """At most `window` samples of a clip (samples,) from second `start` on. Raises a `DataError` if there are none."""
    if not 0 <= start < len(clip) / SAMPLE_RATE:
        raise DataError(f"--start {start:g} is outside the clip, which lasts {len(clip) / SAMPLE_RATE:.2f} s")
    return clip[round(start * SAMPLE_RATE) :][:window]


def ask(model, processor, clip, question: str, choices: list[str], style: str, max_new_tokens: int = MAX_NEW_TOKENS):
    """The completion for one clip, float32 (samples,) at 16 kHz, and the probabilities of the choices (sum 1)."""
    check_audio_token(model, processor)
    batch = encode(processor, [build_question(question, choices, style)], [clip]).to(model.device)
    ids = generate(model, batch, end_ids(processor), max_new_tokens, Greedy(model, batch))[0]
    tokenizer = processor.tokenizer
    completion = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    replies = tokenizer([STYLES[style].reply(choice, completion) for choice in choices])["input_ids"]
    ended = [reply + [tokenizer.eos_token_id] for reply in replies]  # as a turn ends
    return completion, score(model, batch, ended).softmax(dim=0).tolist()


def run(args: Namespace) -> dict:
    """The fields of `--json`: `prompt` is the user's text, `seconds` the length of the encoded clip. Raises a
    `ValueError` or `OSError` if the question, clip or model cannot be used."""
    question, choices = args.question, args.choices
    if broken := [text for text in (question, *choices) if text.encode(errors="ignore").decode() != text]:
        raise DataError(f"{broken[0]!r} is not UTF-8; correct --question or --choices")
    if check_choices(question, choices, "--choices") or not all(map(str.strip, choices)):
        raise DataError(f"--choices {choices} holds an empty or repeated choice; pass different words")
    folder = locate(args.model_path)
    check_model(folder)
    processor = load_processor(folder)
    style = args.prompt_style or load_style(folder) or DEFAULT_STYLE
    prompt = build_question(question, choices, style)
    clip = load_audio(args.audio, args.audio_channels)
    if args.start is not None:
        clip = cut_clip(clip, args.start, processor.feature_extractor.n_samples)
    text_tokens, longest = count_text_tokens(processor, [prompt])[0], processor.tokenizer.model_max_length
    check_prompt(prompt, len(clip), text_tokens, processor, longest)
    dtype, device = (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")
    model = load_model(folder, dtype, torch.device(device))
    completion, probabilities = ask(model, processor, clip, question, choices, style, args.max_new_tokens)
    answer = extract_answer(completion)
    return {
        "model": args.model_path, "style": style, "prompt": prompt, "audio": args.audio,
        "seconds": len(clip) / SAMPLE_RATE, "answer": answer, "completion": completion,
        "names_a_choice": any(string_match(choice, answer, choices) for choice in choices),
        "probabilities": dict(zip(choices, probabilities, strict=True)),
    }  # fmt: skip


def describe(error: Exception) -> str:
    """An error in one line, without advice about the row of a file."""
    message = " ".join(str(error).splitlines())
    found, _, remedy = message.rpartition("; ")
    if not isinstance(error, DataError) or "row" not in remedy.split():
        return message
    return found + ("; --start SECOND selects a part" if error.reason == "clip too long" else "")


def main() -> int:
    args = parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may lack characters
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output holds the result only
            result = run(args)
    except (ValueError, OSError) as error:
        print(printable(f"ask: {describe(error)}"), file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result))
        return 0
    mark = "" if result["names_a_choice"] else "  (none of the choices)"
    lines = [f"answer:     {result['answer']}{mark}", f"completion: {result['completion']}"]
    for choice, probability in sorted(result["probabilities"].items(), key=lambda item: -item[1]):
        lines.append(f"{100 * probability:9.2f}%  {choice}")
    print(printable("\n".join(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
