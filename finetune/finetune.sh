#!/bin/sh
# Full-parameter tuning of InternLM-XComposer2 with the values of its guide; the rest is finetune_ds.sh's.
# Change the values here, or set them in the environment; flags given to this script are passed on:
#
#     MODEL=internlm/internlm-xcomposer2-4khd-7b DATA=data.txt HD_NUM=16 bash finetune.sh --num_train_epochs 2

MODEL=${MODEL:-internlm/internlm-xcomposer2-vl-7b} # a folder or a Hugging Face Hub id
DATA=${DATA:-data.txt}                # lines of a JSON file and thousands of samples, or a data file itself
IMG_SIZE=${IMG_SIZE:-}                # pixels; empty: the checkpoint's, which is the only right one
HD_NUM=${HD_NUM:-}                    # tiles of 4khd, such as 16; -1 or empty for the other two
MODEL_MAX_Length=${MODEL_MAX_Length:-4096} # tokens, those of images included
OUTPUT_DIR=${OUTPUT_DIR:-output/finetune}

if [ -z "${MAX_STEPS:-}" ]; then
    set -- --num_train_epochs 1 "$@"
fi
set -- \
    ${IMG_SIZE:+--img_size "$IMG_SIZE"} \
    ${HD_NUM:+--hd_num "$HD_NUM"} \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-5 \
    --save_strategy "epoch" \
    --save_total_limit 1 \
    "$@"

. "$(dirname -- "$0")/finetune_ds.sh"
