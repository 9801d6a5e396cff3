#!/usr/bin/env bash
# chatdoctor_7b.sh's second stage on several nodes, by plain torchrun. Run it on every node:
#
#   HOST=node0 NODES=4 MODEL=/shared/general DATA=/shared/data OUT=/shared/out runs/chatdoctor_7b_nodes.sh
#
# HOST: the first node's name, reached by all at PORT; keep that port closed to everybody else, as whoever reaches it
# can run code. MODEL, DATA and OUT on a file system that all nodes share. NODES may be a range, 3:4: when a node is
# lost, torchrun starts the others again, and they go on from the newest checkpoint. Weights are sharded within a node
# and copied from node to node (hybrid_shard), so that the slow network carries gradients alone.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${HOST:?the name of the first node}"
NODES=${NODES:-2} GPUS=${GPUS:-8} PORT=${PORT:-29400} ID=${ID:-chatdoctor}
MODEL=${MODEL:-weights/llama-7b} DATA=${DATA:-data_files} OUT=${OUT:-out/chatdoctor-7b-nodes}

# Without it a restarted rank finds the addresses of the dead ones in torchrun's store (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Asked to stop, torchrun waits so many seconds for the ranks to save before it kills them (its own default is 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-110}
exec torchrun --nnodes="$NODES" --nproc_per_node="$GPUS" --max-restarts=20 \
  --rdzv_backend=c10d --rdzv_endpoint="$HOST:$PORT" --rdzv_id="$ID" train.py \
  --model_name_or_path "$MODEL" --output_dir "$OUT" --resume_from_checkpoint auto \
  --data_path "$DATA/HealthCareMagic-200k.json" "$DATA/iCliniq.json" "$DATA/chatdoctor5k.json" \
  --bf16 True --tf32 True --num_train_epochs 3 --model_max_length 2048 \
  --per_device_train_batch_size "${BATCH:-8}" --gradient_accumulation_steps 1 \
  --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
  --eval_fraction 0.005 --evaluation_strategy epoch --save_strategy steps --save_steps 200 --save_total_limit 2 \
  --fsdp "hybrid_shard auto_wrap" --skip_bad_records True
