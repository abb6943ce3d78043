# Sourced by the launchers that train: checks what a run needs, then starts SCRIPT with the flags in "$@" under torchrun.

case " $* " in
*" --use_cpu true "*) ENGINE= ;; # DeepSpeed would compile operators for the CPU first
*) ENGINE=conf/ds_zero2.json ;;
esac
CONFIG=${CONFIG-$ENGINE} # DeepSpeed settings: conf/ds_zero3.json, conf/ds_zero3_offload.json; empty: none
NODE_NUM=${NODE_NUM:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-32777}

set -- ${CONFIG:+--deepspeed "$CONFIG"} "$@"

PROCESSES=$("$PYTHON" src/launch/preflight.py "$@")
GPU_NUM=${GPU_NUM:-$PROCESSES} # processes on this machine, one for each GPU

exec "$PYTHON" -m torch.distributed.run \
    --nproc_per_node "$GPU_NUM" \
    --nnodes "$NODE_NUM" \
    --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" \
    --master_port "$MASTER_PORT" \
    "$SCRIPT" "$@"
