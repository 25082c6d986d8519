#!/usr/bin/env bash
# From nothing to a scored miniature, on two CPU cores:
#
#     bash mini/speedrun.sh              # 105 minutes, reckoned from the speed of its steps
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

train() { # NAME STEPS OPTIONS...: train.py on both cores
    local name=$1 steps
    steps=$(awk "BEGIN { print int($2 * $SCALE + 0.5) }")
    shift 2
    once "$name" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node $PROCESSES train.py \
        --steps "$steps" --out "$OUT/$name" --resume "$@"
}

guidance() { # NAME CHECKPOINT: the one at which it draws best, stored
    OMP_NUM_THREADS=2 once "$1" "$PYTHON" -m mini.evaluate guidance --checkpoint "$2" --num 60
}

stage() { # NUMBER STEPS: Dream Engine's own training
    local file="weights/mini/stage$1.safetensors"
    train "stage$1" "$2" --stage "$1"
    [ -f "$OUT/guidance$1.done" ] || cp "$OUT/stage$1/stage$1.safetensors" "$file"
    guidance "guidance$1" "$file"
}

(part t5 && part lmm && after vae $$ && part decoder) & side=$!
part vae
after t5 $side
part base
wait $side
once export "$PYTHON" -m mini.pretrain export --out "$OUT"
stage 1 2000
stage 2 4400
train unialignment 5714 --stage unialignment --tasks t2i=1,edit=1.5,answer=0.8 --null 0.05 \
    --weights text=0.5 --loss velocity --warmup 200 --decay 0.6
guidance guidance-unialignment "$OUT/unialignment" # and to weights/mini/unialignment
OMP_NUM_THREADS=2 "$PYTHON" -m mini.evaluate --num "$N" --run "$OUT" --out "$OUT/scores"
