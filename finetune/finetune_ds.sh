#!/bin/sh
# Full-parameter tuning: vision, resampler and language model, under DeepSpeed ZeRO-2.
# Change the values here, or set them in the environment; flags given to this script are passed on:
#
#     MODEL=openbmb/MiniCPM-V-2_6 DATA=train.json EVAL_DATA=eval.json bash finetune_ds.sh --num_train_epochs 1

GPUS_PER_NODE=${GPUS_PER_NODE:-}      # processes on this machine; empty: one for each GPU, or one on the CPU
NNODES=${NNODES:-1}                   # machines
NODE_RANK=${NODE_RANK:-0}             # number of this machine, from 0
MASTER_ADDR=${MASTER_ADDR:-localhost} # address of machine 0
MASTER_PORT=${MASTER_PORT:-6001}      # a free port there

MODEL=${MODEL:-openbmb/MiniCPM-V-2_6} # a folder or a Hugging Face Hub id
DATA=${DATA:-path/to/training_data}   # JSON file, see "Your data" in the README
EVAL_DATA=${EVAL_DATA:-}              # JSON file; empty: no evaluation
LLM_TYPE=${LLM_TYPE:-auto}            # auto reads it from the checkpoint; or minicpm, llama, llama3, qwen
MODEL_MAX_Length=${MODEL_MAX_Length:-2048} # tokens, those of images included
MAX_STEPS=${MAX_STEPS:-10000}         # optimizer steps; --num_train_epochs, when given, counts instead
OUTPUT_DIR=${OUTPUT_DIR:-output/output_ds}
PRECISION=${PRECISION:-}              # bf16, fp16 or fp32; empty: the best that the hardware computes natively
DEEPSPEED=${DEEPSPEED-ds_config_zero2.json} # a file, here or beside this script; set but empty: no DeepSpeed

. "$(dirname -- "$0")/launcher.sh"

torchrun \
    --nproc_per_node "$GPUS_PER_NODE" \
    --nnodes "$NNODES" \
    --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" \
    --master_port "$MASTER_PORT" \
    "$HERE/finetune.py" \
    --model_name_or_path "$MODEL" \
    --llm_type "$LLM_TYPE" \
    --data_path "$DATA" \
    ${EVAL_DATA:+--eval_data_path "$EVAL_DATA"} \
    --remove_unused_columns false \
    --label_names "labels" \
    --prediction_loss_only false \
    --bf16 "$BF16" \
    --bf16_full_eval "$BF16" \
    --fp16 "$FP16" \
    --fp16_full_eval "$FP16" \
    --do_train \
    ${EVAL_DATA:+--do_eval} \
    --tune_vision true \
    --tune_llm true \
    --model_max_length "$MODEL_MAX_Length" \
    --max_slice_nums 9 \
    --max_steps "$MAX_STEPS" \
    --eval_steps 1000 \
    --output_dir "$OUTPUT_DIR" \
    --logging_strategy "steps" \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --eval_strategy "$EVAL_STRATEGY" \
    --save_strategy "steps" \
    --save_steps 1000 \
    --save_total_limit 10 \
    --learning_rate 1e-6 \
    --weight_decay 0.1 \
    --adam_beta2 0.95 \
    --warmup_steps 0.01 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --activation_checkpointing true \
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} \
    --report_to "tensorboard" \
    "$@"
