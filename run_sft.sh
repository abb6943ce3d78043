#!/bin/sh
# Supervised fine-tuning, the baseline that the paper compares GRPO with.
#
#   sh run_sft.sh [--flag value ...]           flags: python src/train_sft.py --help
#   sh run_sft.sh --use_peft true              adapters (LoRA) instead of all weights
#   sh run_sft.sh --resume                     resume an interrupted run; pass the same flags
#
# Machine and paths come from the environment, as for run_grpo.sh:  OUT_DIR=exp/x GPU_NUM=4 sh run_sft.sh
set -eu
. "$(dirname "$0")/paths.sh"

SCRIPT=src/train_sft.py
OUT_DIR=${OUT_DIR:-exp/sft}

# The format that the prompt requests and the model learns: choice (the paper's Prompt <1>) or answer (Prompt <2>).
PROMPT_STYLE=${PROMPT_STYLE:-choice}

. ./launch.sh
