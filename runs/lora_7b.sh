#!/usr/bin/env bash
# ChatDoctor's train_lora.py: LLaMA-7B stands still, adapters of rank 8 on q and v learn the doctor's dialogues.
#
#   MODEL=weights/llama-7b DATA=data_files GPUS=1 runs/lora_7b.sh
#
# MODEL: a directory that convert_weights.py wrote, or the first stage of chatdoctor_7b.sh (OUT/general). DATA: a folder
# with HealthCareMagic-200k.json, iCliniq.json and chatdoctor5k.json. OUT: the merged model; OUT/adapter: the adapters,
# as peft reads them. BITS: 4 (the default: 7B trains in 6 GB, by the arithmetic of tests/llama/test_nf4.py) or 16.
# The global batch is 128 records on any number of GPUs that divides 32: 4 records a GPU, accumulated.
# Running it again goes on where it stopped.
#
# As there: rank, alpha, dropout, targets, learning rate, linear decay after 100 steps, batch, epochs, 256 tokens, a save
# and an evaluation every 200 steps. Not as there: bf16 for fp16 and 4 bits for 8; the prompt is not learnt (its
# train_on_inputs), the prompt format is that of the full recipe (its own carries 16 spaces of indentation), and a
# fiftieth is held out (2,000 records there).
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-weights/llama-7b} DATA=${DATA:-data_files} OUT=${OUT:-out/lora-7b} GPUS=${GPUS:-1} BITS=${BITS:-4}
ACCUMULATION=$((128 / 4 / GPUS))
((ACCUMULATION * 4 * GPUS == 128)) || { echo "error: GPUS=$GPUS does not divide 32" >&2; exit 2; }

[[ -f $OUT/config.json ]] && { echo "$OUT is finished" >&2; exit; }
torchrun --standalone --nproc_per_node="$GPUS" train.py \
  --model_name_or_path "$MODEL" --output_dir "$OUT" --resume_from_checkpoint auto \
  --data_path "$DATA/HealthCareMagic-200k.json" "$DATA/iCliniq.json" "$DATA/chatdoctor5k.json" --skip_bad_records True \
  --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules q_proj v_proj --base_bits "$BITS" \
  --bf16 True --tf32 True --gradient_checkpointing True --num_train_epochs 3 --model_max_length 256 \
  --per_device_train_batch_size 4 --gradient_accumulation_steps "$ACCUMULATION" \
  --learning_rate 3e-4 --weight_decay 0. --warmup_steps 100 --lr_scheduler_type linear --logging_steps 10 \
  --eval_fraction 0.02 --evaluation_strategy steps --eval_steps 200 \
  --save_strategy steps --save_steps 200 --save_total_limit 3
