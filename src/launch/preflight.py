"""Say at once, before minutes are spent on loading, what a run lacks: model, data, GPU, engine settings, packages;
and which of its flags cannot be.

Run by the launchers with the training script and the flags that it will get; how many processes they start is their
environment's. Prints the number of GPUs, or 1 without; all that is missing goes to standard error, with its remedy, and
the exit status is not 0.
"""

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.rows import read_json
from launch.packages import find_missing_packages

SWITCHES = ("use_cpu", "use_wandb", "use_liger_kernel", "load_in_4bit", "load_in_8bit", "use_vllm")
COUNTS = {"GPU_NUM": 1, "NODE_NUM": 1, "NODE_RANK": 0, "MASTER_PORT": 1}  # variables, and the least that they can be
DEMO = "`sh run_grpo.sh demo` needs none of it: it makes its own data and model and trains on a laptop in minutes."


def find_model_problem(model: str) -> str | None:
    """What is wrong with a model's folder or hub name; None if it is there, or can be fetched."""
    path = Path(model)
    if path.is_dir():
        is_model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
        return None if is_model else f"model: {model} has no config.json, so it is no model's folder"
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        return f"model: there is no folder {model}; set MODEL_NP to a folder or to a name on the hub"
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return None
    remedy = f"download it where there is a network (hf download {model}) and set MODEL_NP to its folder"
    if constants.HF_HUB_OFFLINE:
        return f"model: {model} is not in the cache and HF_HUB_OFFLINE is set; {remedy}"
    try:
        HfApi().model_info(model, timeout=10)
    except Exception as error:  # whatever the hub's client raises, the model cannot be fetched now
        return f"model: {model} is not in the cache and the hub gives {type(error).__name__}; {remedy}"
    return None


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """The few flags that matter here, spelled as the training scripts take them; the last one given counts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_name_or_path", "--model-name-or-path", default="")
    parser.add_argument("--data_file", "--data-file", default="")
    parser.add_argument("--deepspeed", "--config_path", "--config-path", default="")
    parser.add_argument("--optim", default="")
    parser.add_argument("--report_to", "--report-to", nargs="+", default=[])
    for flag in SWITCHES:
        parser.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", nargs="?", const="true", default="false")
    flags, _ = parser.parse_known_args(arguments)
    for flag in SWITCHES:
        setattr(flags, flag, getattr(flags, flag).lower() in ("true", "t", "yes", "y", "1"))
    if flags.use_wandb:
        flags.report_to = ["wandb"]
    return flags


def find_engine_problem(config: str) -> str | None:
    """What is wrong with a file of DeepSpeed's settings; None if it can be used, or none is."""
    if not config:
        return None
    if not Path(config).is_file():
        return f"engine: there is no file {config}; CONFIG names one of conf/*.json"
    if importlib.util.find_spec("deepspeed") is None:
        return "engine: DeepSpeed is not installed (it is for Linux); an empty CONFIG trains without it"
    try:
        read_json(config, "CONFIG names one of conf/*.json")
    except ValueError as error:
        return f"engine: {error}"
    return None


def find_count_problems() -> list[str]:
    """Which of the launchers' variables that count something hold no number that can be."""
    wrong = [name for name, least in COUNTS.items() if not is_count(os.environ.get(name) or str(least), least)]
    return [f"{name}: is {os.environ[name]!r}; a whole number from {COUNTS[name]} on is needed" for name in wrong]


def is_count(word: str, least: int) -> bool:
    """Whether a word is a whole number from `least` on."""
    return word.isdecimal() and int(word) >= least


def check_flags(script: str, arguments: list[str], processes: int) -> None:
    """Parse the whole command line as the script will, with its, TRL's and transformers' own checks, as for `processes`
    processes over all nodes. No process is joined, no device looked at, no engine started: that is left to the script.

    Raises:
        ValueError, OSError, SystemExit: as the script's parser.
    """
    sys.argv[0] = script  # what errors begin with
    os.environ["WORLD_SIZE"] = str(processes)
    parser = importlib.import_module(Path(script).stem).make_parser()
    import torch
    from transformers import TrainingArguments

    TrainingArguments._setup_devices = property(lambda self: torch.device("cpu"))
    TrainingArguments.world_size = processes
    parser.parse_args_and_config([*arguments, "--deepspeed", ""])


def main() -> None:
    script, *arguments = sys.argv[1:]
    flags, count = parse_flags(arguments), 1
    problems = [*find_count_problems(), find_model_problem(flags.model_name_or_path)]
    if not Path(flags.data_file).is_file():
        remedy = "data/README.md says how to prepare it, DATA_FILE names another"
        problems.append(f"data: there is no file {flags.data_file}; {remedy}")
    problems += [find_engine_problem(flags.deepspeed), *find_missing_packages(vars(flags))]
    if not flags.use_cpu:
        import torch

        if not (count := torch.cuda.device_count()):
            remedy = "--use_cpu true trains without, which only small models are fit for"
            problems.append(f"GPU: PyTorch sees none; {remedy}")
    if any(problems):
        sys.exit("\n  ".join(["This run cannot start:", *filter(None, problems), DEMO]))
    processes = int(os.environ.get("GPU_NUM") or count) * int(os.environ.get("NODE_NUM") or 1)
    # A single process that is not wrapped (see start.py) says it itself, as soon: the imports, seconds, are spent once.
    if processes > 1 or flags.deepspeed or os.environ.get("MASTER_PORT"):
        try:
            check_flags(script, arguments, processes)
        except (ValueError, OSError) as error:
            sys.exit(f"{Path(script).name}: {error}")
    print(count)


if __name__ == "__main__":
    main()
