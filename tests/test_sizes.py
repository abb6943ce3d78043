"""The size of the project: `python tests/test_sizes.py` prints it, and these limits hold it."""

import sys
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src"
# What a researcher reads to change the algorithm; `src/run` attaches the rest.
CORE = [
    "train.py", "test_mmau.py", "dataset/*.py", "model/*.py", "trainer/*.py", "evaluation/answers.py",
    "evaluation/mmau.py", "utils/rewards.py",
]  # fmt: skip
LIMITS = {
    "lines of the core": 2500,
    "lines of src": 6600,
    "lines of grpo_trainer.py": 260,
    "overridden methods of TRL and transformers": 8,
}


def count_lines(paths) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def overridden_methods() -> list[str]:
    """Methods of `AudioGRPOTrainer` and its mixins that `GRPOTrainer` has, too."""
    from trl import GRPOTrainer

    from trainer.grpo_trainer import AudioGRPOTrainer

    own = [kind for kind in AudioGRPOTrainer.__mro__ if kind not in GRPOTrainer.__mro__]
    theirs = {name for kind in GRPOTrainer.__mro__[:-1] for name in vars(kind)}
    return [f"{kind.__name__}.{name}" for kind in own for name, value in vars(kind).items()
            if name in theirs and (callable(value) or isinstance(value, property))]  # fmt: skip


def measure() -> dict[str, int]:
    return {
        "lines of the core": count_lines({path for pattern in CORE for path in SRC.glob(pattern)}),
        "lines of src": count_lines(SRC.rglob("*.py")),
        "lines of grpo_trainer.py": count_lines([SRC / "trainer" / "grpo_trainer.py"]),
        "overridden methods of TRL and transformers": len(overridden_methods()),
    }


def test_the_sizes_are_within_their_limits():
    assert all((SRC / name).is_file() for name in CORE if "*" not in name)
    assert {name: size for name, size in measure().items() if size > LIMITS[name]} == {}


if __name__ == "__main__":
    sys.path.insert(0, str(SRC))
    for name, size in measure().items():
        print(f"{size:6,} {name}, at most {LIMITS[name]:,}")
    print(f"       {', '.join(overridden_methods())}")
