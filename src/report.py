"""Write the report of a run as one HTML file that opens without network: python src/report.py exp/model

It uses what the run has written so far, also if it was killed or no checkpoint is evaluated. See `utils/report.py`.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from evaluation.files import write_whole
from utils.flags import at_least
from utils.report import build_report


def main() -> None:
    parser = ArgumentParser(
        description="Write a run's report: curves, accuracies, answers and clips.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder that holds checkpoint-* or test_*")
    parser.add_argument("--out", type=Path, help="file to write; default: report.html in the run's folder")
    parser.add_argument("--audio_dir", type=Path, help="folder of the clips' paths; default: as recorded")
    parser.add_argument("--clips", type=at_least(0), default=50, help="number of embedded clips (60 kB for 10 s), "
        "first of questions on which checkpoints differ; the others are linked")  # fmt: skip
    parser.add_argument("--allow_outside", action="store_true", help="use clips outside --audio_dir as well")
    args = parser.parse_args()
    out = args.out or args.run / "report.html"
    try:
        write_whole(out, build_report(args.run, args.audio_dir, args.clips, out.parent, args.allow_outside))
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
    print(out)


if __name__ == "__main__":
    main()
