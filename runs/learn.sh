#!/usr/bin/env bash
# A model learns from what its users said of its answers, and replaces the old one only if it has become no worse.
#
#   MODEL=out/tiny FEEDBACK=feedback.db OUT=out/learnt runs/learn.sh
#
# FEEDBACK: ratings of `generate.py --feedback`, reviewed with `python -m data.prepare review`. REPLAY: files of what the
# model learnt before, mixed in so that it does not forget; by default dialogues like those of the built-in sample. SHARE:
# how often an approved answer comes up per epoch, a replayed one coming once. SUITE, EVAL: what evaluate.py measures
# before and after, and further flags of it; a figure that gets worse than its 95 % interval keeps the new model from OUT,
# and ends this with 1.
# TRAIN: further flags of train.py. The candidate, both evaluations and the data stay in $OUT.work.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-out/tiny} FEEDBACK=${FEEDBACK:-feedback.db} OUT=${OUT:-out/learnt} PYTHON=${PYTHON:-python}
SUITE=${SUITE:-quick} SHARE=${SHARE:-4} WORK=$OUT.work
read -ra TRAIN <<<"${TRAIN:-}"
read -ra EVAL <<<"${EVAL:-}"
read -ra REPLAY <<<"${REPLAY:-}"
[[ -e $OUT ]] && { echo "error: $OUT is there already; choose another OUT" >&2; exit 2; }
mkdir -p "$WORK"

"$PYTHON" -m data.prepare feedback "$FEEDBACK" "$WORK/feedback.jsonl"
if ((${#REPLAY[@]} == 0)); then
  REPLAY=("$WORK/replay.jsonl")
  [[ -f ${REPLAY[0]} ]] || "$PYTHON" -m data.synthesize --n 2000 --output "${REPLAY[0]}"
fi

latest=$(cat out/latest 2>/dev/null || true) # train.py names what it finished last; a refused model must not be that
restore() { if [[ -n $latest ]]; then echo "$latest" >out/latest; else rm -f out/latest; fi; }
trap restore EXIT
"$PYTHON" train.py --model_name_or_path "$MODEL" --output_dir "$WORK/candidate" --overwrite_output_dir \
  --data_path "$WORK/feedback.jsonl" "${REPLAY[@]}" \
  --data_weights "$SHARE" "${REPLAY[@]/*/1}" \
  --num_train_epochs 1 --learning_rate 1e-4 --warmup_ratio 0.1 --save_strategy no "${TRAIN[@]}"

"$PYTHON" evaluate.py --checkpoint "$MODEL" --suite "$SUITE" --out "$WORK/before" "${EVAL[@]}"
rm -rf "$WORK/after" # of an earlier candidate
"$PYTHON" evaluate.py --checkpoint "$WORK/candidate" --suite "$SUITE" --out "$WORK/after" --against "$WORK/before" \
  "${EVAL[@]}"

mv "$WORK/candidate" "$OUT"
latest=$(realpath "$OUT")
echo "published $OUT; talk to it: python generate.py --checkpoint $OUT"
