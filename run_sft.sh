#!/bin/sh
# Supervised fine-tuning, the baseline that the paper compares GRPO with.
#
#   sh run_sft.sh [--flag value ...]           flags: python src/train_sft.py --help
#   sh run_sft.sh --use_peft true              adapters (LoRA) instead of all weights
#
# Machine and paths come from the environment, as for run_grpo.sh:  OUT_DIR=exp/x GPU_NUM=4 sh run_sft.sh
set -eu
[ -f src/train_sft.py ] || cd "$(dirname "$0")"

MODEL_NP=${MODEL_NP:-Qwen/Qwen2-Audio-7B-Instruct} # a folder of any name, or a name on the hub
DATA_FILE=${DATA_FILE:-data/AVQA/train_qa.data}
OUT_DIR=${OUT_DIR:-exp/sft}

# What the prompt asks for, and the model learns to write: choice (the paper's Prompt <1>) or answer (Prompt <2>).
PROMPT_STYLE=${PROMPT_STYLE:-choice}

set -- \
    --model_name_or_path "$MODEL_NP" \
    --data_file "$DATA_FILE" \
    --output_dir "$OUT_DIR" \
    --prompt_style "$PROMPT_STYLE" \
    "$@"

. ./setup_env.sh
SCRIPT=src/train_sft.py
. ./launch.sh
