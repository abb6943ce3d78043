"""Packages that the requirements leave out, since only some flags need them: which of them a run lacks.

Nothing is imported to find out. Leaves out what the flags mean.
"""

from collections.abc import Mapping
from importlib.util import find_spec

BITSANDBYTES = ("bitsandbytes", "bitsandbytes==0.50.2")
# optimizer -> module, and what pip calls it, as transformers' `trainer_optimizer` has them
OPTIMIZERS = {
    name: package
    for package, names in {
        BITSANDBYTES: (
            "adamw_bnb_8bit adamw_8bit paged_adamw_32bit paged_adamw_8bit ademamix ademamix_8bit paged_ademamix_32bit "
            "paged_ademamix_8bit lion_32bit lion_8bit paged_lion_32bit paged_lion_8bit rmsprop_bnb rmsprop_bnb_8bit "
            "rmsprop_bnb_32bit"
        ),
        ("galore_torch", "galore-torch"): (
            "galore_adamw galore_adamw_8bit galore_adafactor galore_adamw_layerwise galore_adamw_8bit_layerwise "
            "galore_adafactor_layerwise"
        ),
        ("apollo_torch", "apollo-torch"): "apollo_adamw apollo_adamw_layerwise",
        ("torchao", "torchao"): "adamw_torch_4bit adamw_torch_8bit",
        ("schedulefree", "schedulefree"): "schedule_free_radam schedule_free_adamw schedule_free_sgd",
        ("lomo_optim", "lomo-optim"): "lomo adalomo",
        ("grokadamw", "grokadamw"): "grokadamw",
        ("optimi", "torch-optimi"): "stable_adamw",
    }.items()
    for name in names.split()
}
# flag -> its value -> module, and what pip calls it
NEEDED = {
    "report_to": {name: (name, name) for name in ("clearml", "codecarbon", "dagshub", "dvclive", "mlflow", "neptune")}
    | {name: (name, name) for name in ("swanlab", "tensorboard", "trackio", "wandb")}
    | {
        "comet_ml": ("comet_ml", "comet-ml"),
        "flyte": ("flytekit", "flytekit"),
        "azure_ml": ("azureml", "azureml-core"),
    },
    "optim": OPTIMIZERS,
    "use_liger_kernel": {"true": ("liger_kernel", "liger-kernel")},
    "load_in_4bit": {"true": BITSANDBYTES},
    "load_in_8bit": {"true": BITSANDBYTES},
    "use_vllm": {"true": ("vllm", "vllm")},
    "engine": {"vllm": ("vllm", "vllm")},  # of evaluation
}
# module -> what installs it, where that is not pip alone
INSTALLERS = {"vllm": "sh setup_vllm.sh makes an environment with it, . .venv-vllm/bin/activate enters that"}
INSTEAD = {"tensorboard": "tensorboardX"}  # another module that does


def find_missing_packages(settings: Mapping[str, object]) -> list[str]:
    """What a run with these flags lacks: a sentence for each flag, with the command that installs it.

    Args:
        settings: flag -> its value, or several; flags that need no package do no harm.
    """
    problems = []
    for flag, packages in NEEDED.items():
        values = settings.get(flag)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            value = str(getattr(value, "value", value))
            value = value.lower() if isinstance(values, bool) else value
            module, name = packages.get(value, ("", ""))
            if module and not find_spec(module) and not (module in INSTEAD and find_spec(INSTEAD[module])):
                needs = f"needs the package {name.partition('==')[0]}, which is not installed"
                remedy = INSTALLERS.get(module, f"python -m pip install {name}")
                problems.append(f"--{flag} {value}: {needs}; {remedy}")
    return problems
