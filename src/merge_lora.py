"""Adapter checkpoint -> full model: python src/merge_lora.py --adapter exp/model/checkpoint-500 --out exp/merged

The full model loads without PEFT and has the base model's tensor names.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from evaluation.checkpoints import check_model, write_merged


def main() -> None:
    parser = ArgumentParser(description="Merge a LoRA checkpoint into a full model.", allow_abbrev=False)
    parser.add_argument("--adapter", required=True, type=Path, help="checkpoint of a run with --use_peft true")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--base", default="", help="base model; default: the one that the adapter records")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"], help="to write")
    args = parser.parse_args()
    try:
        if args.out.exists():
            raise ValueError(f"{args.out}: exists already; choose another --out")
        if not (args.adapter / "adapter_config.json").is_file():
            raise ValueError(f"{args.adapter}: holds no adapter; pass a checkpoint of a run with --use_peft true")
        check_model(args.adapter, args.base)
        args.out.mkdir(parents=True)  # fails now if it cannot be written
        write_merged(args.adapter, args.out, args.base, args.dtype)
    except (ValueError, OSError) as error:
        sys.exit(f"merge_lora.py: {error}")
    print(f"{args.out}: written")


if __name__ == "__main__":
    main()
