"""Check that this interpreter has the packages that a file pins: `python check_requirements.py requirements.txt`.

Installs nothing: prints the command that does. Another version than the pinned one is reported; for packages whose
private methods this project overrides, it is an error.
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
    """(missing or wrong packages, packages of other versions), each as `name==pinned (found: ...)`."""
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
    if sys.version_info < (3, 11):  # noqa: UP036, the interpreter is the user's
        sys.exit(f"the active environment has Python {platform.python_version()}; activate one with 3.11 or newer")
    lacking, differing = compare_versions(read_pins(path))
    if differing:
        print("untested versions: " + ", ".join(differing), file=sys.stderr)
    if lacking:
        sys.exit(
            f"the active environment lacks {', '.join(lacking)}\nrun:  python -m pip install -r {path}\n"
            "or leave the environment (deactivate) to have a .venv made here"
        )


if __name__ == "__main__":
    main()
