"""Adapter checkpoint -> full model: python src/merge_lora.py --adapter exp/model/checkpoint-500 --out exp/merged

The full model loads without PEFT and has the base model's tensor names.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from evaluation.checkpoints import check_model, write_merged


def merge(adapter: str | Path, out: str | Path, base: str = "", dtype: str = "auto") -> None:
    """As `write_merged`; raises a `ValueError` if `out` exists, or one of the two models is damaged."""
    if Path(out).exists():
        raise ValueError(f"{out}: exists already; choose another --out")
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"{adapter}: holds no adapter; pass a checkpoint of a run with --use_peft true")
    check_model(Path(adapter), base)
    Path(out).mkdir(parents=True)  # fails now if it cannot be written
    write_merged(adapter, Path(out), base, dtype)


def main() -> None:
    parser = ArgumentParser(description="Merge a LoRA checkpoint into a full model.", allow_abbrev=False)
    parser.add_argument("--adapter", required=True, help="checkpoint of a run with --use_peft true")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--base", default="", help="base model; default: the one that the adapter records")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"],
                        help="of the written weights; default: the base's own")  # fmt: skip
    args = parser.parse_args()
    try:
        merge(**vars(args))
    except (ValueError, OSError) as error:
        sys.exit(f"merge_lora.py: {error}")
    print(f"{args.out}: written")


if __name__ == "__main__":
    main()
