#!/usr/bin/env bash
# The built-in model learns to answer from rows of the disease database, and to cite them.
#
#   runs/grounded_tiny.sh
#
# BASE: the model to go on from (default out/tiny, which `make demo` trains). OUT: where data and models go.
# First rows before the questions, with plain questions replayed so that these are not unlearnt; then the same with
# drills, which only teach to copy. STEPS: optimizer steps of the two stages (default "900 9000": the second takes three
# minutes on an H200, which it leaves mostly idle, and hours on two cores; with "900 750" copying had only begun, see
# docs/log.md). SAMPLES: rows, plain; rows, drills, plain.
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${BASE:-out/tiny} OUT=${OUT:-out/grounded} PYTHON=${PYTHON:-.venv/bin/python}
read -r ROWS_STEPS COPY_STEPS <<<"${STEPS:-900 9000}"
read -r ROWS PLAIN MORE_ROWS DRILLS MORE_PLAIN <<<"${SAMPLES:-10000 7000 15000 30000 10000}"

stage() { # stage NAME START STEPS DIALOGUES_A_STEP SAMPLES...
  local name=$1 start=$2 steps=$3 batch=$4
  shift 4
  [[ -f $OUT/$name/config.json ]] && { echo "$OUT/$name is finished" >&2; return; }
  mkdir -p "$OUT"
  "$PYTHON" -m data.grounded_samples "$@" --output "$OUT/$name.jsonl"
  "$PYTHON" train.py \
    --model_name_or_path "$start" --data_path "$OUT/$name.jsonl" --output_dir "$OUT/$name" \
    --resume_from_checkpoint auto --instruction "" --max_steps "$steps" --model_max_length 400 \
    --per_device_train_batch_size "$batch" --learning_rate 3e-3 --warmup_steps 40 --adam_beta2 0.98 \
    --weight_decay 0.05 --save_steps 200 --save_total_limit 1
}

stage rows "$BASE" "$ROWS_STEPS" 14 --grounded "$ROWS" --plain "$PLAIN" --seed 1
stage copy "$OUT/rows" "$COPY_STEPS" 18 --grounded "$MORE_ROWS" --drills "$DRILLS" --plain "$MORE_PLAIN" --seed 2
