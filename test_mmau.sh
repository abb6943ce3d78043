#!/bin/sh
# Evaluate checkpoints on MMAU and print one table, best first.
#
#   sh test_mmau.sh [--flag value ...]         every checkpoint of OUT_DIR; flags: python src/test_mmau.py --help
#   sh test_mmau.sh demo [--flag value ...]    all models of `sh run_grpo.sh demo`, on its own questions: held-out ones,
#                                              and ones away from the training's (mmau_shifted.json)
#
# Machine and paths come from the environment:  OUT_DIR=exp/x STEPS="base 300 500" sh test_mmau.sh --hear silent
set -eu
. "$(dirname "$0")/paths.sh"

SHIFTED=
case "${1:-}" in
demo)
    shift
    OUT_DIR=${OUT_DIR:-exp/demo}
    MMAU_DIR=${MMAU_DIR:-data/demo}
    [ -n "${DATA_FILE:-}" ] || SHIFTED=$MMAU_DIR/mmau_shifted.json
    DATA_FILE=${DATA_FILE:-$MMAU_DIR/mmau_demo.json}
    MODEL_NP=${MODEL_NP:-$OUT_DIR/untrained}
    STEPS=${STEPS:-untrained warm_start sft all}
    if ! [ -d "$OUT_DIR/untrained" ]; then
        echo "There is no demo in $OUT_DIR: sh run_grpo.sh demo makes it, OUT_DIR names another folder." >&2
        exit 1
    fi
    set -- --max_new_tokens 16 "$@" # an answer has 6
    ;;
esac

OUT_DIR=${OUT_DIR:-exp/model}                      # holds checkpoint-*; results go to its test_*
MMAU_DIR=${MMAU_DIR:-data/MMAU}                    # holds the questions and the folders of clips
MODEL_NP=${MODEL_NP:-Qwen/Qwen2-Audio-7B-Instruct} # the base model
BATCH_SIZE=${BATCH_SIZE:-32}
STEPS=${STEPS:-all}                                # "300 500", say; "all" checkpoints; "base", the base model; folders of OUT_DIR

DATA_FILE=${DATA_FILE:-$MMAU_DIR/mmau-test-mini.json}
# The full test set, 9000 questions. Its answers are blank: no table, but res_mmau.json, the file to submit.
# DATA_FILE=$MMAU_DIR/mmau-test.json

# What the prompt asks for is recorded in each checkpoint; without a record it is the paper's Prompt <2>.
# Uncomment the second line for checkpoints without a record that were trained with the paper's Prompt <3>.
PROMPT_STYLE=${PROMPT_STYLE:-}
# PROMPT_STYLE=think

. ./setup_env.sh

set -- --data_file "$DATA_FILE" ${SHIFTED:+"$SHIFTED"} --audio_dir "$MMAU_DIR" --out_dir "$OUT_DIR" --batch_size "$BATCH_SIZE" \
    ${PROMPT_STYLE:+--prompt_style "$PROMPT_STYLE"} "$@"
MODELS=0
for STEP in $STEPS; do
    case $STEP in
    all)
        for MODEL in "$OUT_DIR"/checkpoint-*; do
            if [ -d "$MODEL" ]; then
                set -- "$MODEL" "$@"
                MODELS=$((MODELS + 1))
            fi
        done
        ;;
    base)
        set -- "base=$MODEL_NP" "$@"
        MODELS=$((MODELS + 1))
        ;;
    *[!0-9]*)
        set -- "$OUT_DIR/$STEP" "$@"
        MODELS=$((MODELS + 1))
        ;;
    *)
        set -- "$OUT_DIR/checkpoint-$STEP" "$@"
        MODELS=$((MODELS + 1))
        ;;
    esac
done
if [ "$MODELS" = 0 ]; then
    echo "There is no checkpoint-* in $OUT_DIR: sh run_grpo.sh makes them, OUT_DIR names another folder," >&2
    echo "and STEPS=base evaluates the base model $MODEL_NP." >&2
    exit 1
fi

# Processes, one for each GPU, or a single one without.
GPU_NUM=${GPU_NUM:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
STATUS=0
GPU_NUM=$GPU_NUM CONFIG= NODE_NUM=1 NODE_RANK=0 MASTER_PORT= RESTARTS=0 \
    "$PYTHON" src/run/launch.py src/test_mmau.py --model_path "$@" || STATUS=$?
case $STATUS in
0 | 3) "$PYTHON" src/utils/show_acc.py -i "$OUT_DIR" ;; # 3: some models were skipped
esac
exit "$STATUS"
