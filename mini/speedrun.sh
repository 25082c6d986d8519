#!/usr/bin/env bash
# From nothing to a scored miniature, on two CPU cores:
#
#     bash mini/speedrun.sh              # about an hour
#     SCALE=2 bash mini/speedrun.sh      # twice the steps of every training: better
#
# Stop it at any time; the same command goes on where it stopped. Parts that do not wait for each
# other share the two cores, one each. Everything lands in $OUT: checkpoints, logs, pictures; the
# finished weights in weights/mini/.
set -euo pipefail
cd "$(dirname "$0")/.."
SCALE=${SCALE:-1} OUT=${OUT:-runs/speedrun} PYTHON=${PYTHON:-python}
# Large buffers are kept and not given back to the system at every step: a quarter faster.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
mkdir -p "$OUT"

timed() { # NAME COMMAND...: run it and note its minutes
    local name=$1 start=$SECONDS
    shift
    "$@"
    echo "$name $(((SECONDS - start) / 60)).$((((SECONDS - start) % 60) / 6))" >>"$OUT/minutes.txt"
}

part() { # a part of the pre-training, once
    [ -f "$OUT/$1.done" ] || { timed "$1" "$PYTHON" -m mini.pretrain "$1" --scale "$SCALE" --out "$OUT" && touch "$OUT/$1.done"; }
}

stage() { # a stage of Dream Engine's own training on both cores, then its guidance; once
    local steps
    steps=$(awk "BEGIN { print int($2 * $SCALE + 0.5) }")
    [ -f "$OUT/stage$1.done" ] && return
    timed "stage$1" torchrun --standalone --nproc-per-node 2 train.py --stage "$1" --steps "$steps" \
        --out "$OUT/stage$1" --resume
    cp "$OUT/stage$1/stage$1.safetensors" "weights/mini/stage$1.safetensors"
    OMP_NUM_THREADS=2 timed "guidance$1" "$PYTHON" -m mini.report guidance "weights/mini/stage$1.safetensors" --n 60
    touch "$OUT/stage$1.done"
}

part vae & vae=$!
part t5
wait $vae
part base & base=$!
part lmm
part decoder
wait $base
part export
stage 1 2000
stage 2 3200
OMP_NUM_THREADS=2 timed card "$PYTHON" -m mini.report card --minutes "$OUT/minutes.txt"
