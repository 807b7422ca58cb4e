# The body of finetune_lora.sh and finetune_ds.sh, which set the variables: checks the command line, looks at the
# hardware, settles what was left open, and starts the processes. Works under any POSIX shell.

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

say() { printf '%s\n' "$*" >&2; }

# The environment whose bin folder is on PATH, or the one that demo.sh and run_tests.sh made.
if ! command -v torchrun >/dev/null && [ -x "$HERE/../.venv/bin/torchrun" ]; then
    PATH=$HERE/../.venv/bin:$PATH
    export PATH
fi
TORCHRUN=$(command -v torchrun || true)
if [ -n "$TORCHRUN" ] && [ -x "$(dirname -- "$TORCHRUN")/python" ]; then
    PYTHON=$(dirname -- "$TORCHRUN")/python
else
    PYTHON=$(command -v python3 || command -v python || true)
fi
if [ -z "$PYTHON" ]; then
    say "No python on PATH. Activate the environment in which finetune/requirements.txt is installed."
    exit 1
fi

# torchrun, but for what it does with signals; see start_processes.py. exec, so that they reach it.
torchrun() {
    if [ -n "${MAX_RESTARTS:-}" ]; then
        # Processes that are started again continue from the last checkpoint. Without the variable they
        # would look for the store of the processes that ended (torch 2.13).
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        before=
        for word in "$@"; do
            case "$before $word" in
                "--resume_from_checkpoint true" | *" --resume_from_checkpoint=true") ;;
                "--resume_from_checkpoint "* | *" --resume_from_checkpoint="* | *" --overwrite_output_dir"*)
                    say "With MAX_RESTARTS a run goes on from the last checkpoint in its output folder, at every start."
                    say "Leave out --resume_from_checkpoint and --overwrite_output_dir, and give another folder if need be."
                    exit 1
                    ;;
            esac
            before=$word
        done
        set -- --max_restarts "$MAX_RESTARTS" "$@" --resume_from_checkpoint true
        # Where processes meet at --master_port, one store serves every start: processes that are started again
        # find the addresses of those that ended in it, and may wait for each other for ever (torch 2.13).
        if [ -z "${RDZV:-}" ] && [ "$NNODES" = 1 ]; then
            RDZV=localhost:0
        elif [ -z "${RDZV:-}" ]; then
            RDZV=$MASTER_ADDR:$MASTER_PORT
            RDZV_CONF=is_host=$((NODE_RANK == 0))
        fi
    fi
    if [ -n "${RDZV:-}" ]; then
        # Where a machine can't tell that the address is its own: RDZV_CONF=is_host=1 there, is_host=0 elsewhere.
        # LOCAL_ADDR, the address under which the others reach it, is otherwise the one it reaches them from.
        set -- --rdzv_backend c10d --rdzv_endpoint "$RDZV" --rdzv_id "${RDZV_ID:-finetune}" \
            ${RDZV_CONF:+--rdzv_conf "$RDZV_CONF"} ${LOCAL_ADDR:+--local_addr "$LOCAL_ADDR"} "$@"
    fi
    exec "$PYTHON" "$HERE/start_processes.py" "$@"
}

# One flag per line; a flag given to the launcher comes later and wins.
LAUNCHER_FLAGS=${LAUNCHER_FLAGS:-$#}
if [ -n "$FSDP" ]; then DEEPSPEED=; fi
steps=$MAX_STEPS
if [ -n "$EPOCHS" ]; then steps=-1; fi
evaluates=${EVAL_DATA:+yes}
precision=$PRECISION
for word in "$@"; do
    case $word in
        # Ours must not contradict it: the other precision, or a number of steps that would overrule the epochs.
        --bf16 | --bf16=* | --fp16 | --fp16=*) precision=fp32 ;;
        --num_train_epochs | --num_train_epochs=*) steps=-1 ;;
        --eval_split | --eval_split=*) evaluates=yes ;;
    esac
done
eval_strategy=${evaluates:+steps}
eval_strategy=${eval_strategy:-no}
case $TUNE in
    lora)
        set -- \
            --tune_llm false \
            --use_lora true \
            --lora_target_modules "llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)" \
            "$@"
        ;;
    full) set -- --tune_llm true "$@" ;;
esac
set -- \
    --model_name_or_path "$MODEL" \
    --llm_type "$LLM_TYPE" \
    --data_path "$DATA" \
    ${EVAL_DATA:+--eval_data_path "$EVAL_DATA"} \
    --remove_unused_columns false \
    --label_names "labels" \
    --prediction_loss_only false \
    --do_train \
    ${evaluates:+--do_eval} \
    --tune_vision true \
    --model_max_length "$MODEL_MAX_Length" \
    --max_slice_nums 9 \
    --max_steps "$steps" \
    ${EPOCHS:+--num_train_epochs "$EPOCHS"} \
    --eval_steps "$EVAL_STEPS" \
    --output_dir "$OUTPUT_DIR" \
    --logging_strategy "steps" \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --eval_strategy "$eval_strategy" \
    --save_strategy "steps" \
    --save_steps "$SAVE_STEPS" \
    --save_total_limit 10 \
    --learning_rate "$LEARNING_RATE" \
    --weight_decay 0.1 \
    --adam_beta2 0.95 \
    --warmup_steps 0.01 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --activation_checkpointing auto \
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} \
    ${FSDP:+--fsdp "$FSDP"} \
    --report_to "tensorboard" \
    "$@"

# Help and mistakes first: looking at the hardware takes seconds.
PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m minicpm_tune.settings.finetune_command \
    ${MAX_RESTARTS:+--resume_from_checkpoint true} "$@" || exit 1
for word in "$@"; do
    case $word in
        -h | --help | --help-all | --version) exit 0 ;;
    esac
done

if ! found=$("$PYTHON" "$HERE/minicpm_tune/settings/hardware.py" "$MASTER_PORT"); then
    say "$PYTHON can't look at the hardware (message above)."
    say "Is everything installed there? $PYTHON -m pip install -r $HERE/requirements.txt"
    exit 1
fi
read -r device processes best_precision cores free_port <<END
$found
END

processes=${GPUS_PER_NODE:-$processes}
case $processes in
    *[!0-9]* | 0*)
        say "GPUS_PER_NODE is '$GPUS_PER_NODE', expected a number from 1 (or unset, to use what is there)."
        exit 1
        ;;
esac
port=$MASTER_PORT
if [ "$NNODES" = 1 ] && [ "$free_port" != "$MASTER_PORT" ]; then
    say "Port $MASTER_PORT is in use on this machine; using $free_port. Set MASTER_PORT to choose another."
    port=$free_port
fi

bf16=false
fp16=false
case ${precision:-$best_precision} in
    bf16) bf16=true ;;
    fp16) fp16=true ;;
    fp32) ;;
    *)
        say "PRECISION is '$PRECISION', expected bf16, fp16 or fp32 (or unset, to choose by the hardware)."
        exit 1
        ;;
esac

case ${MEMORY:-} in
    "") ;;
    auto)
        added=$(PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m minicpm_tune.planning.fitting \
            "$((processes * NNODES))" --bf16 "$bf16" --fp16 "$fp16" "$@") || exit 1
        # One by one: they stand behind the user's flags, and belong to the command that continues the run.
        for word in $added; do
            set -- "$@" "$word"
            LAUNCHER_FLAGS=$((LAUNCHER_FLAGS + 1))
        done
        ;;
    *)
        say "MEMORY is '$MEMORY', expected auto (or unset: the run only says whether it fits)."
        exit 1
        ;;
esac

if [ "$device" = cpu ]; then
    # Without these torchrun gives each process one thread, and DeepSpeed warns about a missing GPU.
    threads=$((cores / processes))
    if [ "$threads" -lt 1 ]; then threads=1; fi
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
    # Threads that wait for each other by spinning take ten times as long when something else runs too.
    OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
    DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    export OMP_NUM_THREADS OMP_WAIT_POLICY DS_ACCELERATOR
elif [ -z "${PYTORCH_ALLOC_CONF+set}${PYTORCH_CUDA_ALLOC_CONF+set}" ]; then
    # Batches differ in size: blocks of memory that grow leave fewer gaps than new ones.
    PYTORCH_ALLOC_CONF=expandable_segments:True
    export PYTORCH_ALLOC_CONF
fi

# For the command that continues a stopped run, see minicpm_tune/settings/finetune_command.py.
LAUNCHER=$HERE/$(basename -- "$0")
export LAUNCHER LAUNCHER_FLAGS

torchrun \
    --nproc_per_node "$processes" \
    --nnodes "$NNODES" \
    --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" \
    --master_port "$port" \
    "$HERE/finetune.py" \
    --bf16 "$bf16" \
    --bf16_full_eval "$bf16" \
    --fp16 "$fp16" \
    --fp16_full_eval "$fp16" \
    "$@"
