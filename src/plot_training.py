"""Draw the curves of training runs over one another: python src/plot_training.py exp/a exp/b --out curves.png

The figures come from the newest complete `trainer_state.json`, so a run may be unfinished or killed.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from run.curves import plot_curves, read_history


def main() -> None:
    parser = ArgumentParser(description="Draw the curves of training runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold checkpoint-* or test_*")
    parser.add_argument("--out", type=Path, help="picture; default: training.png of a single run, else ./curves.png")
    args = parser.parse_args()
    path = args.out or (args.runs[0] / "training.png" if len(args.runs) == 1 else Path("curves.png"))
    try:
        plot_curves({str(run): (run, read_history(run)) for run in args.runs}, path)
    except (ValueError, OSError) as error:
        sys.exit(f"plot_training.py: {error}")
    print(path)


if __name__ == "__main__":
    main()
