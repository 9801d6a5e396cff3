#!/usr/bin/env bash
# ChatDoctor's whole recipe: LLaMA-7B, general instructions first, then the doctor's dialogues.
#
#   MODEL=weights/llama-7b DATA=data_files GPUS=6 runs/chatdoctor_7b.sh
#
# MODEL: a directory that convert_weights.py wrote. DATA: a folder with alpaca_data.json (Stanford Alpaca, 52k),
# HealthCareMagic-200k.json, iCliniq.json and chatdoctor5k.json. OUT: where both stages go.
# The global batch is 192 records on any number of GPUs that divides 48: 4 records a GPU, accumulated.
# Running it again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-weights/llama-7b} DATA=${DATA:-data_files} OUT=${OUT:-out/chatdoctor-7b} GPUS=${GPUS:-6}
ACCUMULATION=$((192 / 4 / GPUS))
((ACCUMULATION * 4 * GPUS == 192)) || { echo "error: GPUS=$GPUS does not divide 48" >&2; exit 2; }

stage() { # stage NAME START FILES...
  local name=$1 start=$2
  shift 2
  [[ -f $OUT/$name/config.json ]] && { echo "$OUT/$name is finished" >&2; return; }
  torchrun --standalone --nproc_per_node="$GPUS" train.py \
    --model_name_or_path "$start" --data_path "$@" --output_dir "$OUT/$name" --resume_from_checkpoint auto \
    --bf16 True --tf32 True --num_train_epochs 3 --model_max_length 512 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps "$ACCUMULATION" \
    --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --eval_fraction 0.005 --evaluation_strategy epoch --save_strategy steps --save_steps 500 --save_total_limit 2 \
    --fsdp "full_shard auto_wrap" --gradient_checkpointing True --skip_bad_records True
}

stage general "$MODEL" "$DATA/alpaca_data.json"
stage doctor "$OUT/general" "$DATA/HealthCareMagic-200k.json" "$DATA/iCliniq.json" "$DATA/chatdoctor5k.json"
