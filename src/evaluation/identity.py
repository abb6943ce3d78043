"""Find a checkpoint, and identify it by its bytes, without loading it or the libraries that could."""

import hashlib
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from dataset.rows import read_json
from model.files import PROCESSOR_FILES, WEIGHTS

from .files import hash_file, write_whole

UNUSED = ["*.md", "*.png", "*.mp3", "*.wav"]  # files of a hub model
FINGERPRINTS = ".fingerprint.json"  # hashes of a checkpoint's files, in its folder (`_hash_files`)


class IncompleteCheckpoint(ValueError):
    """A checkpoint that does not exist, is incomplete or is damaged."""


def locate(model: str, revision: str | None = None, download: bool = True) -> Path:
    """`model` if it is a folder, else the hub model of that name, from the cache only unless `download`. Raises an
    `IncompleteCheckpoint` if it is neither."""
    if Path(model).is_dir():
        return Path(model)
    if model.startswith(("/", ".")) or model.count("/") != 1:
        raise IncompleteCheckpoint(f"{model}: no such folder")
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=not download, ignore_patterns=UNUSED))
    except Exception as error:  # the hub's client raises many types
        raise IncompleteCheckpoint(f"{model}: no folder, and not found on the hub ({type(error).__name__})") from error


def fingerprint(folder: Path, download: bool = True) -> str:
    """16 hex digits that change with any byte of weights, configuration and processor, an adapter's base included.
    Raises an `IncompleteCheckpoint` if weights or base are missing."""
    digest = hashlib.sha256()
    if (folder / "adapter_config.json").is_file():
        digest.update(fingerprint(find_base(folder, download), download).encode())
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


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights, those listed in its index if there is one. Raises an `IncompleteCheckpoint`
    if there are none, or only pickles."""
    for name in WEIGHTS:
        if (folder / f"{name}.index.json").is_file():
            shards = read_key(folder, f"{name}.index.json", "weight_map", dict).values()
            return [folder / shard for shard in sorted(set(shards))]
        if (folder / name).is_file():
            return [folder / name]
    if pickles := [*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model*.bin")]:
        raise IncompleteCheckpoint(f"{pickles[0]}: a pickle may execute code; convert the weights to safetensors")
    raise IncompleteCheckpoint(f"{folder}: incomplete, it holds no weights")


def find_base(adapter: str | Path, download: bool = True) -> Path:
    """The folder of an adapter's base model: the recorded path, a folder of its name beside the adapter, or a download.
    Raises an `IncompleteCheckpoint` if none is recorded or found."""
    adapter = Path(adapter)
    try:
        name = read_key(adapter, "adapter_config.json", "base_model_name_or_path")
        for folder in (Path(name), adapter.resolve().parent / Path(name).name):
            if (folder / "config.json").is_file():
                return folder
        return locate(name, read_json(adapter / "adapter_config.json", "save it again").get("revision"), download)
    except IncompleteCheckpoint as error:
        remedy = f"run src/merge_lora.py --adapter {shlex.quote(str(adapter))} --base FOLDER --out FOLDER"
        raise IncompleteCheckpoint(f"{adapter}: its base model cannot be found ({error}); {remedy}") from error


def read_key(folder: Path, file: str, key: str, kind: type = str):
    """A value from one of a checkpoint's JSON files; an `IncompleteCheckpoint` if there is none of this type."""
    try:
        if isinstance(value := read_json(folder / file, "save it again")[key], kind):
            return value
        raise TypeError(f"{key} is {value!r:.80}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompleteCheckpoint(f"{folder}: {file} is missing, damaged or has no {key} ({error})") from error
