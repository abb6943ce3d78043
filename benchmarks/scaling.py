"""How a step's cost grows with completions per question, clips, completions' length and questions: one at a time around
the defaults of `step_time.py`, whose options it takes.

    python benchmarks/scaling.py --repeats 1           measures what is missing, then draws docs/img/scaling.png

Every measurement is a file in the folder of `--records`: a run that was interrupted continues. A record with other
settings is measured again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from floor import ROW_BY_ROW, SHARED, SUPERVISED
from step_time import add_options, describe_machine, describe_settings, measure, to_settings
from steps import ROOT, Settings, write_record

AXES = {
    "generations": (2, 4, 8, 16, 32),
    "seconds": (5, 10, 20, 30),
    "completion": (8, 32, 128, 512),
    "questions": (1, 2, 4, 8, 16),
}
TITLES = {
    "generations": "completions per question",
    "seconds": "seconds of a clip",
    "completion": "tokens of a completion",
    "questions": "questions",
}
COLOURS = {ROW_BY_ROW: "#c44e52", SHARED: "#4c72b0", SUPERVISED: "#7f7f7f"}


def measure_all(default: Settings, repeats: int, folder: Path) -> dict[str, list[dict]]:
    """The records along each axis, ordered by its values; the default's own value is one of them."""
    found = {}
    for axis, values in AXES.items():
        found[axis] = []
        for value in sorted({*values, getattr(default, axis)}):
            settings = replace(default, **{axis: value})
            path = (
                folder / f"{settings.questions}x{settings.generations}-{settings.seconds:g}s-{settings.completion}.json"
            )
            about = {"settings": describe_settings(settings), "machine": describe_machine(settings.device)}
            record = json.loads(path.read_text()) if path.is_file() else {}
            if {key: record.get(key) for key in about} != about:
                write_record(path, record := measure(settings, repeats))
            times = ", ".join(f"{way} {found['step']:.3f} s" for way, found in record["ways"].items())
            print(f"{axis} {value:g}: {times}", flush=True)
            found[axis].append(record)
    return found


def draw(records: dict[str, list[dict]], file: Path) -> None:
    """A panel for each axis: seconds of a step, all three ways; dashed, the floor of each."""
    figure, panels = plt.subplots(1, len(records), figsize=(13, 3.6), sharey=True, layout="constrained")
    for panel, (axis, along) in zip(panels, records.items(), strict=True):
        values = [record["settings"][axis] for record in along]
        for way, colour in COLOURS.items():
            panel.plot(values, [record["ways"][way]["step"] for record in along], "o-", color=colour, ms=4, label=way)
            floors = [sum(record["ways"][way]["floor"].values()) for record in along]
            panel.plot(values, floors, "--", color=colour, lw=0.9)
        panel.set(xscale="log", yscale="log", xticks=values, xlabel=TITLES[axis])
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("seconds a step (dashed: floor)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    s = along[0]["settings"]
    figure.suptitle(f"{s['size']}, {s['dtype'].removeprefix('torch.')}, {along[0]['machine']['device']}", fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="How a step's cost grows.")
    add_options(parser)
    parser.add_argument("--records", type=Path, default=ROOT / "exp" / "scaling", help="a file for each measurement")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "img" / "scaling.png")
    args = parser.parse_args()
    args.records.mkdir(parents=True, exist_ok=True)
    draw(measure_all(to_settings(args), args.repeats, args.records), args.picture)


if __name__ == "__main__":
    main()
