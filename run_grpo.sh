#!/bin/sh
# Train with GRPO.
#
#   sh run_grpo.sh [--flag value ...]         the paper's run; flags: python src/train.py --help
#   sh run_grpo.sh demo [--flag value ...]    a small model on synthetic sounds, minutes on a laptop
#
# Machine and paths come from the environment:  OUT_DIR=exp/x GPU_NUM=4 sh run_grpo.sh --max_steps 500 --beta 0.001
set -eu
[ -f src/train.py ] || cd "$(dirname "$0")"

case "${1:-}" in
demo)
    shift
    exec sh run_demo.sh "$@"
    ;;
esac

MODEL_NP=${MODEL_NP:-Qwen/Qwen2-Audio-7B-Instruct} # a folder of any name, or a name on the hub
DATA_FILE=${DATA_FILE:-data/AVQA/train_qa.data}
OUT_DIR=${OUT_DIR:-exp/model}
case " $* " in
*" --use_cpu true "*) ENGINE= ;; # DeepSpeed would compile operators for the CPU first
*) ENGINE=conf/ds_zero2.json ;;
esac
CONFIG=${CONFIG-$ENGINE} # DeepSpeed settings: conf/ds_zero3.json, conf/ds_zero3_offload.json; empty: none
NODE_NUM=${NODE_NUM:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-32777}

# What the prompt asks for, and the reward expects. Uncomment the second line for the paper's Prompt <3>.
PROMPT_STYLE=${PROMPT_STYLE:-answer}
# PROMPT_STYLE=think

. ./setup_env.sh

set -- \
    --model_name_or_path "$MODEL_NP" \
    --data_file "$DATA_FILE" \
    --output_dir "$OUT_DIR" \
    --prompt_style "$PROMPT_STYLE" \
    ${CONFIG:+--deepspeed "$CONFIG"} \
    "$@"

PROCESSES=$("$PYTHON" src/utils/preflight.py "$@")
GPU_NUM=${GPU_NUM:-$PROCESSES} # processes on this machine, one for each GPU

exec "$PYTHON" -m torch.distributed.run \
    --nproc_per_node "$GPU_NUM" \
    --nnodes "$NODE_NUM" \
    --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" \
    --master_port "$MASTER_PORT" \
    src/train.py "$@"
