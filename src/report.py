"""The report of a run, as one HTML file that opens without network: python src/report.py exp/model

It is built from what the run has written so far: training may have been killed, no checkpoint evaluated yet. See
`utils/report.py` for its contents.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from dataset.rows import write_whole
from utils.flags import at_least
from utils.report import build_report


def main() -> None:
    parser = ArgumentParser(
        description="Write a run's report: curves, accuracies, answers and clips.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder that holds checkpoint-* or test_*")
    parser.add_argument("--out", type=Path, help="file to write; default: report.html in the run's folder")
    parser.add_argument(
        "--audio_dir", type=Path, default=Path("data/MMAU"), help="folder that the clips' paths are relative to"
    )
    parser.add_argument("--clips", type=at_least(0), default=50, help="questions whose clip is in the file (about "
        "60 kB for 10 s), those on which checkpoints differ first; the others are linked")  # fmt: skip
    args = parser.parse_args()
    out = args.out or args.run / "report.html"
    try:
        write_whole(out, build_report(args.run, args.audio_dir, args.clips, out.parent))
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
    print(out)


if __name__ == "__main__":
    main()
