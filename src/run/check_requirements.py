"""Whether the running interpreter has what a requirements file pins: `python check_requirements.py requirements.txt`.

Installs nothing: it says the one command that would. Another version than the pinned one is only reported, except for
the packages whose private methods this project overrides.
"""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

EXACT = ("trl", "transformers")
LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[\w.]+)\s*(;\s*sys_platform == \"(?P<platform>\w+)\")?")


def read_pins(path: Path) -> dict[str, str]:
    """Package name -> pinned version, for this platform; `-r other.txt` lines are followed."""
    pins: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            pins |= read_pins(path.parent / line[3:].strip())
        elif (match := LINE.match(line)) and match["platform"] in (None, sys.platform):
            pins[match["name"]] = match["version"]
    return pins


def compare_versions(pins: dict[str, str]) -> tuple[list[str], list[str]]:
    """(what is missing or must be another version, what merely differs), each as `name==pinned (found: ...)`."""
    lacking: list[str] = []
    differing: list[str] = []
    for name, pinned in pins.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            lacking.append(f"{name}=={pinned} (not installed)")
            continue
        if found.split("+")[0] != pinned:
            (lacking if name in EXACT else differing).append(f"{name}=={pinned} (found: {found})")
    return lacking, differing


def main() -> None:
    path = Path(sys.argv[1])
    if sys.version_info < (3, 11):  # noqa: UP036, this runs on whatever is there
        sys.exit(f"Python 3.11 or newer is needed; the active environment has {platform.python_version()}")
    lacking, differing = compare_versions(read_pins(path))
    if differing:
        print("other versions than the tested ones: " + ", ".join(differing), file=sys.stderr)
    if lacking:
        sys.exit(
            f"the active environment lacks {', '.join(lacking)}\nrun:  python -m pip install -r {path}\n"
            "or leave the environment (deactivate), and a .venv is made here"
        )


if __name__ == "__main__":
    main()
