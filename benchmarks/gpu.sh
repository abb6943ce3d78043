#!/bin/sh
# Everything that wants measuring on a machine with a GPU: sh benchmarks/gpu.sh; the table is in OUT_DIR/table.md.
#
# Needs no network and no weights. Each part writes its record to OUT_DIR and is skipped where that is there, so that what
# was cut off goes on. A check or part that fails does not keep the others from being run; the exit status says so then.
set -u
cd "$(dirname "$0")/.."

OUT_DIR=${OUT_DIR:-exp/gpu}
SIZE=${SIZE:-7b}
CHECKS=${CHECKS:-small}     # the size of the model that the checks are made on
REPEATS=${REPEATS:-3}
[ -n "${PYTHON:-}" ] || . ./setup_env.sh || exit 1
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"  # one: TRL refuses several in a process

mkdir -p "$OUT_DIR" || exit 1
failed=0

part() {  # name, script, its options
    record=$OUT_DIR/$1.json again=$OUT_DIR/$1.failed
    [ -f "$record" ] && [ ! -f "$again" ] && { echo "$1: $record is there"; return; }
    echo "== $1" && shift
    : > "$again"
    if "$PYTHON" "$@" --json "$record"; then rm "$again"; else failed=1; fi
}

part correctness benchmarks/correctness.py --size "$CHECKS"
part full benchmarks/step_time.py --size "$SIZE" --checkpointing --repeats "$REPEATS" "$@"
part lora benchmarks/step_time.py --size "$SIZE" --lora --repeats "$REPEATS" "$@"
if "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
    for engine in built-in vllm; do
        part "long-$engine" benchmarks/step_time.py --size "$SIZE" --lora "$@" --repeats 1 \
            --completion "${LONG:-256}" --engine "$engine"
    done
else
    echo "rollouts by vLLM: not installed for $PYTHON (sh setup_vllm.sh, then PYTHON=.venv-vllm/bin/python)"
fi
part evaluation benchmarks/eval_speed.py --size "$SIZE" --questions "${QUESTIONS:-64}" --max_new_tokens 12 64
"$PYTHON" benchmarks/table.py "$OUT_DIR" > "$OUT_DIR/table.md" && cat "$OUT_DIR/table.md" || failed=1
exit $failed
