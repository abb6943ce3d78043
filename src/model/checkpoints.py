"""What a saved model or adapter needs beside its weights to be loaded by transformers 5 and 4.49."""

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils.hub import cached_files

from .files import PROCESSOR_FILES


def keep_base_names(model: PreTrainedModel) -> None:
    """Make `save_pretrained` use the base checkpoint's tensor names, whatever engine loaded the model."""
    # It undoes the renamings that `from_pretrained` records, which under ZeRO-3 include unused legacy ones.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def complete_checkpoint(folder: str | Path, processor: ProcessorMixin) -> None:
    """Add the processor to a folder with a saved model or adapter, and make its configuration portable. The processor's
    files are copied byte for byte, from their folder or the hub's cache, since transformers 4 cannot read what
    `save_pretrained` of transformers 5 writes. It is called only if no such file is found."""
    folder = Path(folder)
    _complete_config(folder)
    for path in folder.glob("*.safetensors"):  # written for their owner alone, whatever the umask
        os.umask(umask := os.umask(0o077))
        path.chmod(0o666 & ~umask)
    name = processor.tokenizer.name_or_path
    try:
        found = cached_files(name, PROCESSOR_FILES, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except OSError:  # neither a folder nor a valid name on the hub
        found = None
    sources = {Path(path).name: Path(path) for path in found or ()}
    for target in (folder / name for name in PROCESSOR_FILES):
        source = sources.get(target.name)
        if source is None:
            target.unlink(missing_ok=True)  # left by an earlier run
        elif source.resolve() != target.resolve():
            shutil.copyfile(source, target)
    if not sources:
        processor.save_pretrained(folder)


def _complete_config(folder: Path) -> None:
    """Make an adapter's path to its base absolute, or repeat a model's dtype and rope_theta where transformers 4 looks
    for them, which would otherwise use its defaults."""
    path = folder / "adapter_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
        if not base or not Path(base).is_dir():  # a name on the hub stays, with its revision
            return
        config["base_model_name_or_path"] = os.path.abspath(base)
    else:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["torch_dtype"] = config["dtype"]
        config["text_config"]["rope_theta"] = config["text_config"]["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
