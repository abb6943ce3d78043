"""Find, check, fingerprint, load and merge checkpoints. `model/checkpoints.py` saves them."""

import hashlib
import json
import shlex
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Qwen2AudioForConditionalGeneration
from transformers.integrations import deepspeed

from dataset.prompt import load_style, save_style
from dataset.rows import read_json
from model.checkpoints import PROCESSOR_FILES, complete_checkpoint, keep_base_names
from model.qwen2_audio import load_processor

from .files import hash_file, write_whole

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
PROCESSOR = (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json"))
FINGERPRINTS = ".fingerprint.json"  # hashes of a checkpoint's files, in its folder (`_hash_files`)


class IncompleteCheckpoint(ValueError):
    """A checkpoint that does not exist, is incomplete or is damaged."""


def label_of(model: str) -> str:
    """The name of a model's results: `300` for `.../checkpoint-300`, else the name of the folder or hub model."""
    return Path(model).resolve().name.removeprefix("checkpoint-")


def locate(model: str, revision: str | None = None) -> Path:
    """`model` if it is a folder, else the hub model of that name. Raises an `IncompleteCheckpoint` if it is neither."""
    if Path(model).is_dir():
        return Path(model)
    if model.startswith(("/", ".")) or model.count("/") != 1:
        raise IncompleteCheckpoint(f"{model}: no such folder")
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=["*.md", "*.png", "*.mp3", "*.wav"]))
    except Exception as error:  # the hub's client raises many types
        raise IncompleteCheckpoint(f"{model}: no folder, and not found on the hub ({type(error).__name__})") from error


def check_whole(folder: Path) -> None:
    """Raise an `IncompleteCheckpoint` that names a missing, truncated or foreign file; reads headers, no tensors."""
    if (folder / "adapter_config.json").is_file():
        _read_key(folder, "adapter_config.json", "base_model_name_or_path")
    elif (found := _read_key(folder, "config.json", "model_type")) != "qwen2_audio":  # transformers only warns
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


def _read_key(folder: Path, file: str, key: str, kind: type = str):
    """A value from one of a checkpoint's JSON files; an `IncompleteCheckpoint` if there is none of this type."""
    try:
        if isinstance(value := read_json(folder / file, "save it again")[key], kind):
            return value
        raise TypeError(f"{key} is {value!r:.80}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompleteCheckpoint(f"{folder}: {file} is missing, damaged or has no {key} ({error})") from error


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights, those listed in its index if there is one. Raises an `IncompleteCheckpoint`
    if there are none, or only pickles."""
    for name in WEIGHTS:
        if (folder / f"{name}.index.json").is_file():
            shards = _read_key(folder, f"{name}.index.json", "weight_map", dict).values()
            return [folder / shard for shard in sorted(set(shards))]
        if (folder / name).is_file():
            return [folder / name]
    if pickles := [*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model*.bin")]:
        raise IncompleteCheckpoint(f"{pickles[0]}: a pickle may execute code; convert the weights to safetensors")
    raise IncompleteCheckpoint(f"{folder}: incomplete, it holds no weights")


def find_base(adapter: str | Path) -> Path:
    """The folder of an adapter's base model: the recorded path, a folder of its name beside the adapter, or a download.
    Raises an `IncompleteCheckpoint` if none is recorded or found."""
    adapter = Path(adapter)
    try:
        name = _read_key(adapter, "adapter_config.json", "base_model_name_or_path")
        for folder in (Path(name), adapter.resolve().parent / Path(name).name):
            if (folder / "config.json").is_file():
                return folder
        return locate(name, read_json(adapter / "adapter_config.json", "save it again").get("revision"))
    except IncompleteCheckpoint as error:
        remedy = f"run src/merge_lora.py --adapter {shlex.quote(str(adapter))} --base FOLDER --out FOLDER"
        raise IncompleteCheckpoint(f"{adapter}: its base model cannot be found ({error}); {remedy}") from error


def fingerprint(folder: Path) -> str:
    """16 hex digits that change with any byte of weights, configuration and processor, an adapter's base included.
    Raises an `IncompleteCheckpoint` if weights or base are missing."""
    digest = hashlib.sha256()
    if (folder / "adapter_config.json").is_file():
        digest.update(fingerprint(find_base(folder)).encode())
    small = (folder / name for name in ("adapter_config.json", "config.json", *PROCESSOR_FILES))
    paths = [*weight_files(folder), *filter(Path.is_file, small)]
    for path, hashed in zip(paths, _hash_files(paths, folder / FINGERPRINTS), strict=True):
        digest.update(f"{path.name} {hashed} ".encode())
    return digest.hexdigest()[:16]


def _hash_files(paths: list[Path], record: Path) -> list[str]:
    """SHA-256 of files. The file `record` caches them by name, size, mtime and ctime, unless it cannot be written or is
    in the hub's cache. (Copying tools may keep the mtime of a changed file; programs cannot set the ctime.)"""
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(read_json(record, "delete it"))

    def look_up(path: Path) -> tuple[str, str]:
        state = path.stat()  # before reading, so that a change in between is noticed the next time
        key = f"{path.name} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        return key, known.get(key) or hash_file(path)

    with ThreadPoolExecutor() as threads:
        hashed = dict(threads.map(look_up, paths))
    if hashed != known and not record.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        with suppress(OSError):
            write_whole(record, json.dumps(hashed, indent=2) + "\n")
    return list(hashed.values())


def _start(folder: str | Path, base: str = "") -> Path:
    """The folder of the full model: an adapter's base, or the folder itself."""
    if not (Path(folder) / "adapter_config.json").is_file():
        return Path(folder)
    return locate(base) if base else find_base(folder)


def load_model(folder: str | Path, dtype: torch.dtype, device: torch.device, base: str = "") -> PreTrainedModel:
    """A checkpoint in evaluation mode; an adapter is merged into its base model. On the device `meta`, tensors have no
    content. Raises an `IncompleteCheckpoint` if it lacks tensors, or cannot be loaded."""
    if dtype == torch.float32:  # TF32 rounds to 10 bits, too coarse for answers that do not depend on the batch
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
