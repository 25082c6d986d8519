#!/usr/bin/env bash
# From nothing to a scored miniature, on two CPU cores:
#
#     bash mini/speedrun.sh              # 65 minutes, reckoned from the speed of its steps
#     SCALE=1.75 bash mini/speedrun.sh   # the committed weights: so many times the steps of all parts
#
# Stop it at any time; the same command goes on where it stopped. Parts that do not wait for each
# other share the two cores, one each. Everything lands in $OUT: checkpoints, logs, pictures, scores;
# the finished weights in weights/mini/.
set -euo pipefail
cd "$(dirname "$0")/.."
SCALE=${SCALE:-1} OUT=${OUT:-runs/speedrun} PYTHON=${PYTHON:-python} N=${N:-300}
PROCESSES=${PROCESSES:-2} # of the stages; 1 for one GPU
# Large buffers are kept and not given back to the system at every step: a quarter faster.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
mkdir -p "$OUT"
trap 'trap - INT TERM; kill 0' INT TERM # the part in the background, too

once() { # NAME COMMAND...: run it if it has not yet ended well, and note its minutes
    local name=$1 start=$SECONDS
    shift
    [ -f "$OUT/$name.done" ] && return
    "$@"
    awk "BEGIN { printf \"$name %.1f\n\", ($SECONDS - $start) / 60 }" >>"$OUT/minutes.txt"
    touch "$OUT/$name.done"
}

part() { # of the pre-training
    once "$1" "$PYTHON" -m mini.pretrain "$1" --scale "$SCALE" --out "$OUT"
}

after() { # NAME PROCESS: wait for a part that another process makes
    until [ -f "$OUT/$1.done" ]; do kill -0 "$2" 2>/dev/null || exit 1; sleep 1; done
}

stage() { # NUMBER STEPS: Dream Engine's own training, on both cores, and the guidance it draws best at
    local steps file="weights/mini/stage$1.safetensors"
    steps=$(awk "BEGIN { print int($2 * $SCALE + 0.5) }")
    once "stage$1" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node $PROCESSES train.py \
        --stage "$1" --steps "$steps" --out "$OUT/stage$1" --resume
    [ -f "$OUT/guidance$1.done" ] || cp "$OUT/stage$1/stage$1.safetensors" "$file"
    OMP_NUM_THREADS=2 once "guidance$1" "$PYTHON" -m mini.evaluate guidance --checkpoint "$file" --num 60
}

(part t5 && part lmm && after vae $$ && part decoder) & side=$!
part vae
after t5 $side
part base
wait $side
once export "$PYTHON" -m mini.pretrain export --out "$OUT"
stage 1 2000
stage 2 4400
OMP_NUM_THREADS=2 "$PYTHON" -m mini.evaluate --num "$N" --run "$OUT" --out "$OUT/scores"
