#!/usr/bin/env bash
# Train and score the whole miniature from scratch, on two CPU cores:
#
#     bash mini/speedrun.sh              # about 105 minutes, estimated from the speed of the steps
#     SCALE=1.75 bash mini/speedrun.sh   # the committed weights: 1.75 times as many steps everywhere
#
# The same command continues a run that was stopped. Parts that do not depend on each other run side
# by side, one on each core. Checkpoints, logs, pictures and scores are written to $OUT, the finished
# weights to weights/mini/.
set -euo pipefail
cd "$(dirname "$0")/.."
SCALE=${SCALE:-1} OUT=${OUT:-runs/speedrun} PYTHON=${PYTHON:-python} N=${N:-300}
PROCESSES=${PROCESSES:-2} # for each training after the base; 1 for one GPU
# Reuse large buffers instead of returning them to the system at every step: a quarter faster.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
mkdir -p "$OUT"
trap 'trap - INT TERM; kill 0' INT TERM # stop the background part, too

once() { # NAME COMMAND...: run a command unless it has succeeded before, and record its minutes
    local name=$1 start=$SECONDS
    shift
    [ -f "$OUT/$name.done" ] && return
    "$@"
    awk "BEGIN { printf \"$name %.1f\n\", ($SECONDS - $start) / 60 }" >>"$OUT/minutes.txt"
    touch "$OUT/$name.done"
}

part() { # NAME: run a part of the pre-training
    once "$1" "$PYTHON" -m mini.pretrain "$1" --scale "$SCALE" --out "$OUT"
}

after() { # NAME PROCESS: wait for a part that another process runs
    until [ -f "$OUT/$1.done" ]; do kill -0 "$2" 2>/dev/null || exit 1; sleep 1; done
}

train() { # NAME STEPS PROGRAM OPTIONS...: run a training program with several processes
    local name=$1 steps
    steps=$(awk "BEGIN { print int($2 * $SCALE + 0.5) }")
    shift 2
    once "$name" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node $PROCESSES -m "$@" \
        --steps "$steps" --out "$OUT/$name" --resume
}

guidance() { # NAME CHECKPOINT: find the best guidance of a checkpoint, and store it there
    OMP_NUM_THREADS=2 once "$1" "$PYTHON" -m mini.evaluate guidance --checkpoint "$2" --num 60
}

stage() { # NUMBER STEPS: train a stage of Dream Engine
    local file="weights/mini/stage$1.safetensors"
    train "stage$1" "$2" train --stage "$1"
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
train unialignment 5714 unialignment.train --tasks t2i=1,edit=1.5,answer=0.8 --null 0.05 \
    --weights text=0.5 --loss velocity --warmup 200 --decay 0.6
guidance guidance-unialignment "$OUT/unialignment" # also writes weights/mini/unialignment
OMP_NUM_THREADS=2 "$PYTHON" -m mini.evaluate --num "$N" --run "$OUT" --out "$OUT/scores"
