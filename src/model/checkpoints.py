"""Checkpoints: which folder a path or hub name means, whether it is whole (by sizes and headers), what tells it apart
(every byte), how it is loaded, and what it gets beside its weights so that everybody reads it. Leaves out when to save.
"""

import hashlib
import json
import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, ProcessorMixin, Qwen2AudioForConditionalGeneration
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils.hub import cached_files

from dataset.prompt import load_style, save_style
from dataset.rows import hash_file, read_json, write_whole

from .qwen2_audio import load_processor

ROOT = Path(__file__).resolve().parents[2]  # where the launchers run, and relative paths started from
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
PICKLED = {"pytorch_model": "model", "adapter_model": "adapter_model"}  # .bin -> what it would be as .safetensors
# A pickle can execute anything when it is read; with weights_only it is refused instead.
CONVERT = (
    "import glob, sys, torch; from safetensors.torch import save_file; folder, old, new = sys.argv[1:]; tensors = {}; "
    "[tensors.update(torch.load(path, map_location='cpu', weights_only=True)) "
    "for path in sorted(glob.glob(f'{glob.escape(folder)}/{old}*.bin'))]; "
    "tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}; "
    "save_file(tensors, f'{folder}/{new}.safetensors', {'format': 'pt'})"
)
# All that a processor may consist of, copied in this order: `check_whole` finds a folder incomplete until the last.
PROCESSOR_FILES = (
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "merges.txt",
    "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "vocab.json", "tokenizer.json",
)  # fmt: skip
PROCESSOR = (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json"))
FINGERPRINTS = ".fingerprint.json"  # in a checkpoint's folder: its files' hashes, see `_hash_files`

MODEL_TYPE = "qwen2_audio"


class IncompleteCheckpoint(ValueError):
    """A checkpoint that is still being saved, was cut off, or is not there."""


def label_of(model: str) -> str:
    """What a result is called: the step of `.../checkpoint-300`, else the folder's or the hub model's own name.

    >>> label_of("exp/model/checkpoint-300"), label_of("Qwen/Qwen2-Audio-7B-Instruct")
    ('300', 'Qwen2-Audio-7B-Instruct')
    """
    return Path(model).resolve().name.removeprefix("checkpoint-")


def locate(model: str, revision: str | None = None) -> Path:
    """The folder of a model given as folder or hub name (which is downloaded once, in a revision or its newest).

    Raises:
        IncompleteCheckpoint: it is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    if model.startswith(("/", ".")) or model.count("/") != 1:
        raise IncompleteCheckpoint(f"{model}: no such folder")
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=["*.md", "*.png", "*.mp3", "*.wav"]))
    except Exception as error:  # whatever the hub's client raises, the model is not to be had
        message = f"{model}: neither a folder nor a model on the hub within reach ({type(error).__name__})"
        raise IncompleteCheckpoint(message) from error


def check_whole(folder: Path) -> None:
    """Raise an `IncompleteCheckpoint` that says what is missing or cut off; reads headers and sizes, no tensors."""
    is_adapter = (folder / "adapter_config.json").is_file()
    config, key = ("adapter_config.json", "base_model_name_or_path") if is_adapter else ("config.json", "model_type")
    try:
        named = read_json(folder / config, "save it again")[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompleteCheckpoint(f"{folder}: incomplete, {config} is missing or cut off") from error
    if not is_adapter and named != MODEL_TYPE:  # of another, transformers would build the full-size default
        raise IncompleteCheckpoint(f"{folder}: holds a model of type {named!r}, not a Qwen2-Audio")
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt"):
                pass  # the headers agree with the file's size
        except (FileNotFoundError, SafetensorError) as error:
            state = "cut off" if path.is_file() else "missing"
            raise IncompleteCheckpoint(f"{folder}: incomplete, {path.name} is {state}") from error
    for names in PROCESSOR:
        if not any((folder / name).is_file() for name in names):
            raise IncompleteCheckpoint(f"{folder}: incomplete, the processor's {' or '.join(names)} is missing")


def weight_files(folder: Path) -> list[Path]:
    """A checkpoint's files of weights, those listed in its index.

    Raises:
        IncompleteCheckpoint: there are none, the index is cut off, or they are pickles: then the message has the
            command that converts them.
    """
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = read_json(index, "save it again")["weight_map"].values()
                return [folder / shard for shard in sorted(set(shards))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise IncompleteCheckpoint(f"{folder}: incomplete, {index.name} is cut off") from error
        if (folder / name).is_file():
            return [folder / name]
    for old, new in PICKLED.items():
        if any(folder.glob(f"{old}*.bin")):
            command = shlex.join(["python", "-c", CONVERT, str(folder), old, new])
            raise IncompleteCheckpoint(
                f"{folder}: its weights are a pickle ({old}*.bin), which could execute anything; weights are read from "
                f"safetensors only. If you trust where it is from, convert it: {command}"
            )
    raise IncompleteCheckpoint(f"{folder}: incomplete, it holds no weights")


def find_base(adapter: str | Path) -> Path:
    """The folder of an adapter's base model, or of its copy from the hub.

    What an adapter records is absolute (`complete_checkpoint`). A relative path, as older ones have it, is looked for
    from the repository, from each folder that holds the adapter, and from the working directory.

    Raises:
        IncompleteCheckpoint: there is no record, or the base is not there.
    """
    command = shlex.join(
        ["python", "src/merge_lora.py", "--adapter", str(adapter), "--base", "FOLDER", "--out", "FOLDER"]
    )
    remedy = f"make a full model with a copy of it: {command}"
    try:
        record = dict(read_json(Path(adapter) / "adapter_config.json", "save it again"))
        name, revision = record["base_model_name_or_path"], record.get("revision")
        if not name or not isinstance(name, str):
            raise ValueError(f"but {name!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompleteCheckpoint(f"{adapter}: adapter_config.json names no base model ({error}); {remedy}") from error
    for start in (ROOT, *Path(adapter).resolve().parents, Path.cwd()):
        if (start / name / "config.json").is_file():  # of an absolute name, `start` is dropped
            return start / name
    try:
        return locate(name, revision)
    except IncompleteCheckpoint as error:
        raise IncompleteCheckpoint(
            f"{adapter}: its base model is not where adapter_config.json says ({error}); move it back, or {remedy}"
        ) from error


def fingerprint(folder: Path) -> str:
    """16 hex digits that change with any byte that decides a checkpoint's answers: of its weights, configuration and
    processor, and for an adapter of its base model's.

    Raises:
        IncompleteCheckpoint: it holds no weights, or its base model cannot be found.
    """
    digest = hashlib.sha256()
    if (folder / "adapter_config.json").is_file():
        base = find_base(folder)
        try:
            digest.update(fingerprint(base).encode())
        except (ValueError, OSError) as error:
            message = f"{folder}: incomplete, its base model {base} is not there or not whole ({error})"
            raise IncompleteCheckpoint(message) from error
    small = (folder / name for name in ("adapter_config.json", "config.json", *PROCESSOR_FILES))
    paths = [*weight_files(folder), *filter(Path.is_file, small)]
    for path, hashed in zip(paths, _hash_files(paths, folder / FINGERPRINTS), strict=True):
        digest.update(f"{path.name} {hashed} ".encode())
    return digest.hexdigest()[:16]


def _hash_files(paths: list[Path], record: Path) -> list[str]:
    """SHA-256 of files, by threads, since reading and hashing leave Python's lock to others.

    A file is hashed once: `record`, where it can be written, remembers name, size, mtime and ctime. The latter, which
    programs cannot set, tells apart what copying tools exchange under an unchanged mtime.
    """
    try:
        remembered = dict(read_json(record, "delete it"))
    except (OSError, ValueError, TypeError):
        remembered = {}

    def look_up(path: Path) -> tuple[str, str]:
        state = path.stat()  # before reading, so that what is written meanwhile is hashed the next time
        key = f"{path.name} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        return key, remembered.get(key) or hash_file(path)

    with ThreadPoolExecutor() as threads:
        hashed = dict(threads.map(look_up, paths))
    if hashed != remembered:
        with suppress(OSError):
            write_whole(record, json.dumps(hashed, indent=2) + "\n")
    return list(hashed.values())


def load_model(folder: str | Path, dtype: torch.dtype, device: torch.device) -> Qwen2AudioForConditionalGeneration:
    """Load a checkpoint for evaluation; an adapter's is merged into its base model.

    Raises:
        IncompleteCheckpoint: it lacks tensors (transformers itself would go on with random ones), holds NaN or infinite
            ones, or cannot be loaded at all.
    """
    try:
        model = _load(folder, dtype).to(device).eval()
    except IncompleteCheckpoint:
        raise
    except Exception as error:  # over damaged files libraries raise anything
        raise IncompleteCheckpoint(f"{folder}: cannot be loaded ({type(error).__name__}: {error})") from error
    for name, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise IncompleteCheckpoint(f"{folder}: {name} holds NaN or infinite weights; training failed before it")
    return model


def _load(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    if dtype == torch.float32:  # TF32 rounds to 10 bits, too coarse for answers that are to be the same in any batch
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if (Path(folder) / "adapter_config.json").is_file():
        return load_merged(folder, dtype=dtype)
    model, info = Qwen2AudioForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, use_safetensors=True
    )
    if missing := sorted(info["missing_keys"]):
        raise IncompleteCheckpoint(f"{folder}: lacks {len(missing)} tensors, e.g. {missing[0]}; save it again")
    return model


def load_merged(adapter: str | Path, base: str | None = None, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """A model with an adapter checkpoint merged into its weights.

    Args:
        base: folder or hub name of the base model; by default the one that the adapter names.
        dtype: of the merged model; `auto` is the base model's.

    Raises:
        ValueError: `adapter` is no adapter's folder, or its base model is not where it says.
    """
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"{adapter}: has no adapter_config.json, so it is no adapter checkpoint")
    base_folder = find_base(adapter) if base is None else locate(str(base))
    for folder in (base_folder, Path(adapter)):
        weight_files(folder)  # or a ValueError that says what is wrong with them
    try:
        model = Qwen2AudioForConditionalGeneration.from_pretrained(base_folder, dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise ValueError(f"{adapter}: its base model {base_folder} cannot be loaded ({error})") from error
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def write_merged(adapter: str | Path, out: Path, base: str | None = None, dtype: str = "auto") -> None:
    """Write the full model of an adapter checkpoint, its processor and its prompt style to a folder; arguments and
    errors as of `load_merged`."""
    model = load_merged(adapter, base, dtype)
    keep_base_names(model)
    model.save_pretrained(out)
    if style := load_style(adapter):
        save_style(out, style)
    complete_checkpoint(out, load_processor(adapter))


def full_model(adapter: Path, folder: Path) -> Path:
    """The full model that training from an adapter checkpoint starts from: `folder`, written unless it is there.

    On the disk, since more than the trained weights is loaded from it: the reference of the KL term, every part of a
    model that ZeRO-3 spreads, and, for new adapters on top, the base that their checkpoints name.
    """
    source = folder / "merged_from.json"
    weights = json.dumps({"weights": fingerprint(adapter)})
    if not source.is_file() or source.read_text(encoding="utf-8") != weights:
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        try:
            write_merged(adapter, partial)
            (partial / source.name).write_text(weights, encoding="utf-8")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def keep_base_names(model: PreTrainedModel) -> None:
    """Have `save_pretrained` write the tensors under the base checkpoint's names, whatever engine loaded the model."""
    # It undoes the renamings that from_pretrained records, which under ZeRO-3 are the legacy ones too, used or not.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def complete_checkpoint(folder: str | Path, processor: ProcessorMixin) -> None:
    """Give a folder with a saved model or adapter what it lacks to be read by everybody.

    The files that its `processor` was loaded from are copied byte for byte, from their folder or the hub's cache:
    training never changes them, and `save_pretrained` of transformers 5 writes what transformers 4 cannot read. It is
    left to processors that were built in memory or whose files are gone.
    """
    folder, name = Path(folder), processor.tokenizer.name_or_path
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        record = json.loads(adapter.read_text(encoding="utf-8"))
        base = record["base_model_name_or_path"]
        if base and Path(base).is_dir():  # else a name on the hub, which stays, with its revision
            record["base_model_name_or_path"] = os.path.abspath(base)
            adapter.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # transformers 4 looks for these elsewhere, and else takes its own defaults.
        config["torch_dtype"] = config["dtype"]
        config["text_config"]["rope_theta"] = config["text_config"]["rope_parameters"]["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.glob("*.safetensors"):  # written for their owner only, whatever the umask
        os.umask(umask := os.umask(0o077))
        path.chmod(0o666 & ~umask)
    try:
        found = cached_files(name, PROCESSOR_FILES, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except OSError:  # neither a folder nor a name that the hub could have
        found = None
    sources = {Path(path).name: Path(path) for path in found or ()}
    for target in (folder / name for name in PROCESSOR_FILES):
        source = sources.get(target.name)
        if source is None:
            target.unlink(missing_ok=True)  # an earlier run's
        elif source.resolve() != target.resolve():
            shutil.copyfile(source, target)
    if not sources:
        processor.save_pretrained(folder)
