#!/bin/sh
# Train with GRPO.
#
#   sh run_grpo.sh [--flag value ...]         the paper's run; flags: python src/train.py --help
#   sh run_grpo.sh --resume                   resume an interrupted run; pass the same flags
#   sh run_grpo.sh demo [--flag value ...]    a small model on synthetic sounds, minutes on a laptop
#
# Machine and paths come from the environment (MODEL_NP, DATA_FILE, CONFIG, GPU_NUM, NODE_NUM ...; see launch.sh):
#   OUT_DIR=exp/x GPU_NUM=4 CONFIG=conf/ds_zero3.json sh run_grpo.sh --max_steps 500 --beta 0.001
set -eu
. "$(dirname "$0")/paths.sh"

# Make data and a small model, train it with GRPO on a CPU, and compare with supervised fine-tuning from the same warm
# start on as many questions (3200). On one machine the seed decides everything; another CPU rounds differently.
demo() {
    DATA=data/demo
    OUT_DIR=${OUT_DIR:-exp/demo}
    SEED=${SEED:-1}
    FLAG=
    for WORD in "$@"; do
        if [ "$FLAG" = --seed ]; then SEED=$WORD; fi
        case $WORD in --seed=*) SEED=${WORD#--seed=} ;; esac
        FLAG=$WORD
    done
    . ./setup_env.sh
    "$PYTHON" demo/make_demo.py --out "$DATA" --seed "$SEED"
    "$PYTHON" demo/warm_start.py --data "$DATA" --out "$OUT_DIR" --seed "$SEED"
    # In parallel, since neither uses more than a core. The output of supervised fine-tuning follows at the end.
    "$PYTHON" src/train_sft.py --use_cpu true --seed "$SEED" --prompt_style answer \
        --model_name_or_path "$OUT_DIR/warm_start" --data_file "$DATA/train.jsonl" --output_dir "$OUT_DIR/sft" \
        --questions_per_step 32 --per_device_train_batch_size 32 --max_steps 100 --save_strategy no --logging_steps 10 \
        --learning_rate 3e-4 > "$OUT_DIR/sft.log" 2>&1 &
    SUPERVISED=$!
    trap 'kill "$SUPERVISED" 2> /dev/null' EXIT
    trap 'exit 130' INT
    "$PYTHON" src/train.py --use_cpu true --seed "$SEED" \
        --model_name_or_path "$OUT_DIR/warm_start" --data_file "$DATA/train.jsonl" --output_dir "$OUT_DIR" \
        --max_steps 200 --save_steps 50 --logging_steps 10 --learning_rate 3e-4 --beta 0 \
        --max_completion_length 16 --per_device_train_batch_size 128 --log_completions true "$@"
    echo "The same questions, supervised:"
    wait "$SUPERVISED" || { cat "$OUT_DIR/sft.log" && exit 1; }
    trap - EXIT INT
    cat "$OUT_DIR/sft.log"
    # Variables of other runs in the environment must not replace the demo's questions.
    OUT_DIR=$OUT_DIR MMAU_DIR=$DATA MODEL_NP= DATA_FILE= PROMPT_STYLE= STEPS= sh test_mmau.sh demo
    echo
    echo "The training's curves, and a report with answers and clips for any browser:"
    echo "$OUT_DIR/training.png"
    "$PYTHON" src/report.py "$OUT_DIR"
}

if [ "${1:-}" = demo ]; then
    shift
    demo "$@"
    exit
fi

SCRIPT=src/train.py
OUT_DIR=${OUT_DIR:-exp/model}

# The format that the prompt requests and the reward expects. Uncomment the second line for the paper's Prompt <3>.
PROMPT_STYLE=${PROMPT_STYLE:-answer}
# PROMPT_STYLE=think

. ./launch.sh
