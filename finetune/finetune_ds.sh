#!/bin/sh
# Full-parameter tuning: vision, resampler and language model, under DeepSpeed ZeRO-2.
# Change the values here, or set them in the environment; flags given to this script are passed on:
#
#     MODEL=openbmb/MiniCPM-V-2_6 DATA=train.json EVAL_DATA=eval.json EPOCHS=3 bash finetune_ds.sh --seed 1

TUNE=full

GPUS_PER_NODE=${GPUS_PER_NODE:-}      # processes on this machine; empty: one for each GPU, or one on the CPU
NNODES=${NNODES:-1}                   # machines
NODE_RANK=${NODE_RANK:-0}             # number of this machine, from 0
MASTER_ADDR=${MASTER_ADDR:-localhost} # address of machine 0
MASTER_PORT=${MASTER_PORT:-6001}      # a free port there

MODEL=${MODEL:-openbmb/MiniCPM-V-2_6} # a folder or a Hugging Face Hub id
DATA=${DATA:-path/to/training_data}   # JSON file, see docs/data.md
EVAL_DATA=${EVAL_DATA:-}              # JSON file; empty: no evaluation
LLM_TYPE=${LLM_TYPE:-auto}            # auto reads it from the checkpoint; or minicpm, llama, llama3, qwen
MODEL_MAX_Length=${MODEL_MAX_Length:-2048} # tokens, those of images included
OUTPUT_DIR=${OUTPUT_DIR:-output/output_ds}

MAX_STEPS=${MAX_STEPS:-10000}         # optimizer steps
EPOCHS=${EPOCHS:-}                    # times that every row is seen; when set, it counts instead of MAX_STEPS
LEARNING_RATE=${LEARNING_RATE:-1e-6}
SAVE_STEPS=${SAVE_STEPS:-1000}        # optimizer steps between checkpoints
EVAL_STEPS=${EVAL_STEPS:-1000}        # optimizer steps between evaluations, with EVAL_DATA
PRECISION=${PRECISION:-}              # bf16, fp16 or fp32; empty: the best that the hardware computes natively
DEEPSPEED=${DEEPSPEED-ds_config_zero2.json} # a file, here or beside this script; set but empty: no DeepSpeed
FSDP=${FSDP:-}                        # such as "full_shard auto_wrap", instead of DeepSpeed

. "$(dirname -- "$0")/launcher.sh"
