"""Check that this interpreter has the packages that a file pins: `python check_requirements.py requirements.txt`.

Another version than the pinned one is reported; for packages whose private methods this project overrides, it is an
error, with the command that installs the right one.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    lacking, differing = list[str](), list[str]()
    for name, pinned in pins.items():
        try:
            found, wrong = version(name).split("+")[0], lacking if name in ("trl", "transformers") else differing
        except PackageNotFoundError:
            found, wrong = "nothing", lacking
        if found != pinned:
            wrong.append(f"{name}=={pinned} (found: {found})")
    return lacking, differing


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036, the interpreter is the user's
        sys.exit("the active environment has an older Python; activate one with 3.11 or newer")
    lacking, differing = compare_versions(read_pins(Path(sys.argv[1])))
    if differing:
        print("untested versions: " + ", ".join(differing), file=sys.stderr)
    if lacking:
        command = f"python -m pip install -r {sys.argv[1]}"
        sys.exit(f"the active environment lacks {', '.join(lacking)}\nrun:  {command}\nor leave it (deactivate)")
