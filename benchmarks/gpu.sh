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
    record=$OUT_DIR/$1.json
    [ -f "$record" ] && { echo "$1: $record is there"; return; }
    echo "== $1" && shift
    "$PYTHON" "$@" --json "$record" || failed=1
}

part correctness benchmarks/correctness.py --size "$CHECKS"
part full benchmarks/step_time.py --size "$SIZE" --checkpointing --repeats "$REPEATS" "$@"
part lora benchmarks/step_time.py --size "$SIZE" --lora --repeats "$REPEATS" "$@"
part evaluation benchmarks/eval_speed.py --size "$SIZE" --questions "${QUESTIONS:-64}" --max_new_tokens 12 64
"$PYTHON" benchmarks/table.py "$OUT_DIR" > "$OUT_DIR/table.md" && cat "$OUT_DIR/table.md" || failed=1
exit $failed
