#!/usr/bin/env bash
# The two stages of chatdoctor_7b.sh in small, on a CPU: general instructions, then doctor's dialogues.
#
#   DATA=../shared/data runs/chatdoctor_tiny.sh
#
# DATA: a folder with general/ (Alpaca-shaped files) and chatdoctor/chatdoctor5k.json. OUT: where both stages go.
# STEPS: optimizer steps of each stage (default 300; about 8 minutes on two cores). The point is the recipe, not
# the model: two million parameters that have read a thousand instructions know nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-../shared/data} OUT=${OUT:-out/chatdoctor-tiny} STEPS=${STEPS:-300} PYTHON=${PYTHON:-.venv/bin/python}

stage() { # stage NAME START FILES...
  local name=$1 start=$2
  shift 2
  [[ -f $OUT/$name/config.json ]] && { echo "$OUT/$name is finished" >&2; return; }
  "$PYTHON" train.py \
    --model_name_or_path "$start" --data_path "$@" --output_dir "$OUT/$name" --resume_from_checkpoint auto \
    --max_steps "$STEPS" --model_max_length 512 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 \
    --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --eval_fraction 0.02 --evaluation_strategy no --save_strategy steps --save_steps 100 --save_total_limit 1
}

stage general tiny "$DATA"/general/alpaca_gpt4_en_demo_1k.json "$DATA"/general/seed_tasks.jsonl \
  "$DATA"/general/self_instruct_user_oriented_252.jsonl
stage doctor "$OUT/general" "$DATA/chatdoctor/chatdoctor5k.json"
