#!/bin/sh
# Sourced by the recipes beside it, which set $here: trains DoRA as the commonsense recipes do (batch 16, 3 epochs, warm-up 100).
# LAUNCH='slurm --gpus 8 --submit' hands it to surefoot.launch instead, where GPU means nothing.
# The cut-off is 512 tokens where theirs was 256: at 256 every seventh row of commonsense_170k loses its answer.
set -eu

commonsense_dora() { # BASE_MODEL LEARNING_RATE R ALPHA OUTPUT_DIR GPU [more flags]
  base=$1 rate=$2
  shift 2
  if [ $# -lt 4 ]; then
    echo "usage: $(basename "$0") R ALPHA OUTPUT_DIR GPU [more finetune.py flags]" >&2
    exit 2
  fi
  r=$1 alpha=$2 out=$3 gpu=$4
  shift 4
  set -- \
    --base_model "${BASE_MODEL:-$base}" \
    --data_path "${DATA_PATH:-commonsense_170k.json}" \
    --output_dir "$out" \
    --adapter_name dora \
    --target_modules q_proj k_proj v_proj up_proj down_proj \
    --lora_r "$r" --lora_alpha "$alpha" --lora_dropout 0.05 \
    --batch_size 16 --micro_batch_size 16 --num_epochs 3 \
    --learning_rate "$rate" --lr_scheduler_type linear --warmup_steps 100 --weight_decay 0 \
    --cutoff_len 512 --val_set_size 120 --eval_step 80 --save_step 80 \
    --use_gradient_checkpointing "$@"
  if [ -n "${LAUNCH:-}" ]; then
    export PYTHONPATH="${here:?the recipe sets it}/..${PYTHONPATH:+:$PYTHONPATH}"
    # shellcheck disable=SC2086 # LAUNCH is a list of words
    exec "${PYTHON:-python}" -m surefoot.launch $LAUNCH -- "$@"
  fi
  CUDA_VISIBLE_DEVICES=$gpu exec "${PYTHON:-python}" "$here/../finetune.py" "$@"
}
