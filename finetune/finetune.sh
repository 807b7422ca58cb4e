#!/bin/sh
# Full-parameter tuning of InternLM-XComposer2 with the values of its guide; finetune_ds.sh does the rest.
# Change the values here, or set them in the environment; flags given to this script are passed on:
#
#     MODEL=internlm/internlm-xcomposer2-4khd-7b DATA=data.txt HD_NUM=16 EPOCHS=2 bash finetune.sh --seed 1

MODEL=${MODEL:-internlm/internlm-xcomposer2-vl-7b} # a folder or a Hugging Face Hub id
DATA=${DATA:-data.txt}                # lines of a JSON file and thousands of samples, or a data file itself
IMG_SIZE=${IMG_SIZE:-}                # pixels; empty: the checkpoint's, which is the only right one
HD_NUM=${HD_NUM:-}                    # tiles of 4khd, such as 16; -1 or empty for the other two
MODEL_MAX_Length=${MODEL_MAX_Length:-4096} # tokens, those of images included
OUTPUT_DIR=${OUTPUT_DIR:-output/finetune}
LEARNING_RATE=${LEARNING_RATE:-1e-5}
if [ -z "${MAX_STEPS:-}" ]; then
    EPOCHS=${EPOCHS:-1}
fi

LAUNCHER_FLAGS=$#
set -- \
    ${IMG_SIZE:+--img_size "$IMG_SIZE"} \
    ${HD_NUM:+--hd_num "$HD_NUM"} \
    --gradient_accumulation_steps 8 \
    --save_strategy "epoch" \
    --save_total_limit 1 \
    "$@"

. "$(dirname -- "$0")/finetune_ds.sh"
