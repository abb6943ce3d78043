"""Check, load and merge checkpoints. `identity.py` finds them, `model/checkpoints.py` saves them."""

import json
import os
import shutil
import uuid
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Qwen2AudioForConditionalGeneration

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


def load_model(folder: str | Path, dtype: torch.dtype, device: torch.device) -> Qwen2AudioForConditionalGeneration:
    """A checkpoint in evaluation mode; an adapter is merged into its base model. Raises an `IncompleteCheckpoint` if it
    lacks tensors, has NaN or infinite ones, or cannot be loaded."""
    if dtype == torch.float32:  # TF32 rounds to 10 bits, too coarse for answers that do not depend on the batch
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    load = load_merged if (Path(folder) / "adapter_config.json").is_file() else _load
    try:
        model = load(folder, dtype=dtype).to(device).eval()
    except IncompleteCheckpoint:
        raise
    except Exception as error:  # libraries raise many types on damaged files
        raise IncompleteCheckpoint(f"{folder}: cannot be loaded ({type(error).__name__}: {error})") from error
    if bad := [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]:
        raise IncompleteCheckpoint(f"{folder}: {bad[0]} has NaN or infinite weights; use an earlier checkpoint")
    return model


def _load(folder: str | Path, dtype: str | torch.dtype) -> PreTrainedModel:
    load = Qwen2AudioForConditionalGeneration.from_pretrained
    model, info = load(folder, dtype=dtype, output_loading_info=True, use_safetensors=True)
    if missing := sorted(info["missing_keys"]):  # transformers initialises them at random
        raise IncompleteCheckpoint(f"{folder}: lacks {len(missing)} tensors, e.g. {missing[0]}; save it again")
    return model


def load_merged(adapter: str | Path, base: str | None = None, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """The base model, by default the recorded one in its own dtype, with an adapter checkpoint merged into its weights.
    Raises a `ValueError` or `OSError` if one of the two cannot be loaded or lacks tensors."""
    folder = find_base(adapter) if base is None else locate(str(base))
    for part in (folder, Path(adapter)):
        weight_files(part)  # refuses pickles, which PEFT would load
    return PeftModel.from_pretrained(_load(folder, dtype), str(adapter)).merge_and_unload()


def write_merged(adapter: str | Path, out: Path, base: str | None = None, dtype: str = "auto") -> None:
    """Write an adapter's full model, processor and prompt style to a folder; arguments and errors as `load_merged`."""
    model = load_merged(adapter, base, dtype)
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
