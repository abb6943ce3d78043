# Sourced by the launchers that train, which set SCRIPT and the defaults of their own (OUT_DIR, PROMPT_STYLE): checks what
# a run needs, then starts SCRIPT under torchrun, with the flags in "$@" after those that follow from the environment.

MODEL_NP=${MODEL_NP:-Qwen/Qwen2-Audio-7B-Instruct} # a folder of any name, or a name on the hub
DATA_FILE=${DATA_FILE:-data/AVQA/train_qa.data}
case " $* " in
*" --use_cpu true "*) ENGINE= ;; # DeepSpeed would compile operators for the CPU first
*) ENGINE=conf/ds_zero2.json ;;
esac
CONFIG=${CONFIG-$ENGINE} # DeepSpeed settings: conf/ds_zero3.json, conf/ds_zero3_offload.json; empty: none
NODE_NUM=${NODE_NUM:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
RESTARTS=${RESTARTS:-0} # times that a run which failed goes on by itself, from its newest whole checkpoint
# Nodes must know the port of the first; on one node it is any that is free, so that runs work side by side.
[ "$NODE_NUM" = 1 ] || MASTER_PORT=${MASTER_PORT:-32777}
[ -n "${MASTER_PORT:-}" ] && STANDALONE= || STANDALONE=yes

set -- \
    ${CONFIG:+--deepspeed "$CONFIG"} \
    --model_name_or_path "$MODEL_NP" \
    --data_file "$DATA_FILE" \
    --output_dir "$OUT_DIR" \
    --prompt_style "$PROMPT_STYLE" \
    "$@"

case $RESTARTS in
*[!0-9]*) echo "RESTARTS is '$RESTARTS'; it must be a number" >&2 && exit 1 ;;
esac

. ./setup_env.sh
PROCESSES=$(
    GPU_NUM=${GPU_NUM:-} NODE_NUM=$NODE_NUM NODE_RANK=$NODE_RANK MASTER_PORT=${MASTER_PORT:-} \
        "$PYTHON" src/launch/preflight.py "$SCRIPT" "$@"
)
GPU_NUM=${GPU_NUM:-$PROCESSES} # processes on this machine, one for each GPU

exec "$PYTHON" src/launch/start.py \
    --nproc_per_node "$GPU_NUM" \
    --nnodes "$NODE_NUM" \
    --max_restarts "$RESTARTS" \
    ${STANDALONE:+--standalone} \
    ${MASTER_PORT:+--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"} \
    "$SCRIPT" "$@"
