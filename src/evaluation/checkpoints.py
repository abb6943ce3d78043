"""Check, load and merge checkpoints. `identity.py` finds them, `model/checkpoints.py` saves them."""

import json
import os
import shutil
import uuid
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Qwen2AudioForConditionalGeneration
from transformers.integrations import deepspeed

from dataset.prompt import load_style, save_style
from model.checkpoints import complete_checkpoint, keep_base_names
from model.qwen2_audio import load_processor

from .identity import IncompleteCheckpoint, find_base, fingerprint, locate, read_key, weight_files

PROCESSOR = (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json"))


def label_of(model: str) -> str:
    """The name of a model's results: `300` for `.../checkpoint-300`, else the name of the folder or hub model."""
    return Path(os.path.abspath(model)).name.removeprefix("checkpoint-")


def check_whole(folder: Path) -> None:
    """Raise an `IncompleteCheckpoint` that names a missing, truncated or foreign file; reads headers, no tensors."""
    if (folder / "adapter_config.json").is_file():
        read_key(folder, "adapter_config.json", "base_model_name_or_path")
    elif (found := read_key(folder, "config.json", "model_type")) != "qwen2_audio":  # transformers only warns
        raise IncompleteCheckpoint(f"{folder}: holds a model of type {found!r}, not a Qwen2-Audio")
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt"):
                pass  # the header fits the file's size
        except (FileNotFoundError, SafetensorError) as error:
            raise IncompleteCheckpoint(f"{folder}: incomplete, {path.name} is missing or cut off") from error
    for names in PROCESSOR:
        if not any((folder / name).is_file() for name in names):
            raise IncompleteCheckpoint(f"{folder}: incomplete, the processor's {' or '.join(names)} is missing")


def check_model(folder: Path, base: str = "") -> None:
    """As `check_whole`, and for tensors that are missing, of another shape, NaN or infinite. Reads all weights, with
    those of an adapter's base (see `load_merged`): once in a run, before they are loaded."""
    check_whole(folder)
    load_model(folder, torch.float32, torch.device("meta"), base)
    for path in {*weight_files(_start(folder, base)), *weight_files(folder)}:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    raise IncompleteCheckpoint(f"{path}: {name} has NaN or infinite weights; use another checkpoint")


def _start(folder: str | Path, base: str = "") -> Path:
    """The folder of the full model: an adapter's base, or the folder itself."""
    if not (Path(folder) / "adapter_config.json").is_file():
        return Path(folder)
    return locate(base) if base else find_base(folder)


def load_model(folder: str | Path, dtype: torch.dtype, device: torch.device, base: str = "") -> PreTrainedModel:
    """A checkpoint in evaluation mode; an adapter is merged into its base model. On the device `meta`, tensors have no
    content. Raises an `IncompleteCheckpoint` if it lacks tensors, or cannot be loaded."""
    # TF32 rounds to 10 bits, too coarse for answers that do not depend on the batch. A check changes no setting.
    if dtype == torch.float32 and device.type != "meta":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        place = "meta" if device.type == "meta" else None
        return load_merged(folder, base, dtype=dtype, device_map=place).to(device).eval()
    except IncompleteCheckpoint:
        raise
    except Exception as error:  # libraries raise many types on damaged files
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise IncompleteCheckpoint(f"{folder}: cannot be loaded ({message})") from error


def load_merged(folder: str | Path, base: str = "", **kwargs) -> PreTrainedModel:
    """A model; that of an adapter checkpoint is merged into its base, by default the recorded one. `kwargs` are those
    of `from_pretrained`. Raises a `ValueError` or `OSError` if one of the two cannot be loaded or lacks tensors."""
    start, on_meta = _start(folder, base), kwargs.get("device_map") == "meta"
    is_adapter = start != Path(folder)
    for part in (start, Path(folder)):
        weight_files(part)  # refuses pickles, which PEFT would load
    zero3, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:  # without ZeRO-3, which would split the model over processes that do not load it
        model, info = Qwen2AudioForConditionalGeneration.from_pretrained(
            start, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True, **kwargs
        )
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
    bad = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}  # initialised at random
    if is_adapter and not bad:
        start, model = Path(folder), PeftModel(model, PeftConfig.from_pretrained(folder))
        options = {"torch_device": "cpu", "ignore_mismatched_sizes": True, "low_cpu_mem_usage": on_meta}
        missing = model.load_adapter(folder, "default", **options).missing_keys
        with safe_open(weight_files(start)[0], "pt") as file:
            kept = {name.partition(".lora_")[0] for name in file.keys()}
        # A layer without any of them had a frozen adapter, which is 0 and which ZeRO-3 does not save.
        bad = {name for name in missing if ".lora_" not in name or name.partition(".lora_")[0] in kept}
    if bad:
        raise IncompleteCheckpoint(f"{start}: {min(bad)} is missing or has another shape ({len(bad)} tensors in all)")
    return model.merge_and_unload() if is_adapter and not on_meta else model


def write_merged(adapter: str | Path, out: Path, base: str = "", dtype: str = "auto") -> None:
    """Write an adapter's full model, processor and prompt style to a folder; arguments and errors as `load_merged`."""
    model = load_merged(adapter, base, dtype=dtype)
    keep_base_names(model)
    model.save_pretrained(out)
    if style := load_style(adapter):
        save_style(out, style)
    complete_checkpoint(out, load_processor(adapter))


def full_model(adapter: Path, folder: Path) -> Path:
    """Write an adapter checkpoint's full model to `folder`, from which training starts, unless it is there; returns it.
    Machines with a shared disk may do so at once: each writes a copy, and the first one renames its copy."""
    record, weights = folder / "merged_from.json", json.dumps({"weights": fingerprint(adapter)})
    if record.is_file() and record.read_text(encoding="utf-8") == weights:
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # of another adapter
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_merged(adapter, partial)
        (partial / record.name).write_text(weights, encoding="utf-8")
        partial.rename(folder)
    except OSError:
        if not record.is_file():  # else another machine was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
