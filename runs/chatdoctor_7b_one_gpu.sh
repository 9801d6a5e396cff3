#!/usr/bin/env bash
# The doctor's stage of chatdoctor_7b.sh as a full fine-tune on one GPU of 141 GB (H200), or of 80 GB (H100, A100).
#
#   MODEL=out/chatdoctor-7b/general DATA=data_files runs/chatdoctor_7b_one_gpu.sh
#   MEMORY=80 MODEL=... runs/chatdoctor_7b_one_gpu.sh
#
# 141 GB: exact fp32 weights in two halves, fp32 moments, 14 bytes a parameter. 80 GB: moments in bf16, 10 bytes. One
# micro-batch holds the 128 records of a step, packed into rows of 2,048; as few blocks are recomputed as fit.
# Running it again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-weights/llama-7b} DATA=${DATA:-data_files} OUT=${OUT:-out/chatdoctor-7b-one-gpu}
MEMORY=${MEMORY:-141} PYTHON=${PYTHON:-python}
case $MEMORY in
  141) OPTIM=adamw_split ;;
  80) OPTIM=adamw_split_bf16 ;;
  *) echo "error: MEMORY=$MEMORY: 141 or 80 (GB) is known" >&2; exit 2 ;;
esac

"$PYTHON" train.py \
  --model_name_or_path "$MODEL" --output_dir "$OUT" --resume_from_checkpoint auto \
  --data_path "$DATA/HealthCareMagic-200k.json" "$DATA/iCliniq.json" "$DATA/chatdoctor5k.json" \
  --bf16 True --tf32 True --optim "$OPTIM" --gradient_checkpointing auto \
  --per_device_train_batch_size 128 --gradient_accumulation_steps 1 --num_train_epochs 3 --model_max_length 2048 \
  --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
  --eval_fraction 0.005 --evaluation_strategy epoch --save_strategy steps --save_steps 500 --save_total_limit 2 \
  --skip_bad_records True
