"""A checkpoint's inputs, logits and answer for a clip, with the transformers that is first on the path: python
read_checkpoint.py CHECKPOINT CLIP OUT. test_saving.py runs it with two versions and compares."""

import sys

import numpy as np
import soundfile
import torch
import transformers


def main(checkpoint: str, clip: str, out: str) -> None:
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    model, loading = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        checkpoint, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"], loading
    parts = [{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    samples, rate = soundfile.read(clip, dtype="float32")
    clips = {"audios" if transformers.__version__.startswith("4.") else "audio": [samples]}
    inputs = processor(text=[text], sampling_rate=rate, padding=True, return_tensors="pt", **clips)
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    np.savez(
        out, logits=logits.float().numpy(), answer=answer.numpy(), version=transformers.__version__,
        dtype=str(model.config.torch_dtype).removeprefix("torch."), **{key: value.numpy() for key, value in inputs.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
