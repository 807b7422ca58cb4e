#!/bin/sh
# Trains a small model on drawn pictures or sung vowels with the real launchers, and shows what it learned; see --help.
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

usage() {
    cat <<'END'
Trains a small model on made-up data with the real launchers, and shows what it learned. It takes about five minutes
on two CPU cores, installation included, and needs no GPU.

    bash demo.sh                       MiniCPM-V 2.6 learns to answer questions about colors
    bash demo.sh --task find           it learns to point at shapes, with boxes
    bash demo.sh --task listen         MiniCPM-o 4.5 learns to tell sung vowels, of singers it never heard
    bash demo.sh --generation v4_5     another MiniCPM: v2 v2_5 v2_6 o2_6 v4 v4_5 o4_5 v4_6 v4_6_thinking v4_7
                                       v4_7_moe ocr_1,
                                       or an InternLM-XComposer2: xc2_7b xc2_vl_7b xc2_4khd_7b
    bash demo.sh --steps 200           steps of each run (200; for find 300, for listen 500)
    bash demo.sh --output FOLDER       where everything goes (demo_output/<generation>, with a task in front of it
                                       demo_output/<task>_<generation>)

What an earlier start has finished is used again. Remove the folder to start over.
END
}

GENERATION=
TASK=colors
STEPS=
BASE=
OUTPUT=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --generation | --task | --steps | --output)
            if [ $# -lt 2 ]; then
                echo "$1 needs a value. bash demo.sh --help lists the flags." >&2
                exit 1
            fi
            ;;
        *)
            echo "Unknown flag $1. bash demo.sh --help lists the flags." >&2
            exit 1
            ;;
    esac
    case $1 in
        --generation) GENERATION=$2 ;;
        --task) TASK=$2 ;;
        --steps) STEPS=$2 ;;
        --output) OUTPUT=$2 ;;
    esac
    shift 2
done
if [ -z "$GENERATION" ]; then
    case $TASK in
        listen) GENERATION=o4_5 ;;
        *) GENERATION=v2_6 ;;
    esac
fi
case " v2 v2_5 v2_6 o2_6 v4 v4_5 o4_5 v4_6 v4_6_thinking v4_7 v4_7_moe ocr_1 xc2_7b xc2_vl_7b xc2_4khd_7b " in
    *" $GENERATION "*) ;;
    *)
        echo "--generation is '$GENERATION', which is no model of the demo. bash demo.sh --help lists them." >&2
        exit 1
        ;;
esac
case $TASK in
    colors) SCRIPT=draw_pictures.py NAME=$GENERATION ;;
    find) SCRIPT=draw_boxes.py NAME=find_$GENERATION STEPS=${STEPS:-300} BASE=--local_queries ;;
    listen) SCRIPT=sing_vowels.py NAME=listen_$GENERATION STEPS=${STEPS:-500} ;;
    *)
        echo "--task is '$TASK', expected colors, find, or listen." >&2
        exit 1
        ;;
esac
case $TASK-$GENERATION in
    listen-o2_6 | listen-o4_5) ;;
    listen-*)
        echo "--task listen: $GENERATION takes no audio, expected --generation o2_6 or o4_5." >&2
        exit 1
        ;;
esac
STEPS=${STEPS:-200}
case $STEPS in
    '' | 0* | *[!0-9]*)
        echo "--steps is '$STEPS', expected a whole number from 1." >&2
        exit 1
        ;;
esac
OUTPUT=${OUTPUT:-$ROOT/demo_output/$NAME}

# Everything after the dot belongs to the sourced script.
prepare() { . "$ROOT/setup_environment.sh"; }
prepare "$ROOT/finetune/requirements.txt"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() { printf '\n=== %s\n' "$*"; }

mkdir -p "$OUTPUT"
if [ ! -e "$OUTPUT/base/generation_config.json" ]; then
    step "1. A small checkpoint of $GENERATION with random weights: $OUTPUT/base"
    python "$ROOT/demo/make_checkpoint.py" "$OUTPUT/base" --generation "$GENERATION" $BASE
else
    step "1. The checkpoint is already there: $OUTPUT/base"
fi
if [ ! -e "$OUTPUT/data/held_out.json" ]; then
    step "2. Data: $OUTPUT/data"
    python "$ROOT/demo/$SCRIPT" "$OUTPUT/data"
else
    step "2. The data is already there: $OUTPUT/data"
fi

# The launchers have the official flags; these are for a small model that starts from nothing.
tune() {
    launcher=$1 model=$2 task=$3 name=$4
    shift 4
    if [ -e "$OUTPUT/$name/run.json" ] && grep -q '"finished"' "$OUTPUT/$name/run.json"; then
        echo "That run is finished: $OUTPUT/$name"
        return
    fi
    MODEL=$model DATA=$OUTPUT/data/${task}_train.json EVAL_DATA=$OUTPUT/data/${task}_eval.json \
        OUTPUT_DIR=$OUTPUT/$name sh "$ROOT/finetune/$launcher" \
        --max_steps "$STEPS" --per_device_train_batch_size 16 --per_device_eval_batch_size 16 \
        --activation_checkpointing false --logging_steps 10 --eval_steps 40 \
        --save_strategy no --overwrite_output_dir true "$@"
}

# Two stages, the second on other words for the same pictures; flags given are passed on to both runs.
run_two_stages() {
    step "3. Full tuning on the questions, with finetune_ds.sh: $OUTPUT/full"
    tune finetune_ds.sh "$OUTPUT/base" questions full --learning_rate 1e-3 --train_sampling_strategy group_by_length "$@"
    step "4. LoRA on the descriptions, from that result, with finetune_lora.sh: $OUTPUT/lora"
    tune finetune_lora.sh "$OUTPUT/full" descriptions lora --learning_rate 3e-3 --train_sampling_strategy group_by_length --vision_lr 1e-4 \
        --resampler_lr 1e-4 "$@"
    step "5. Held-out pictures, before and after (LoRA learned the descriptions alone, and may forget the questions)"
    OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} python "$ROOT/demo/compare.py" "$OUTPUT"
}

# Not by length here: boxes at the edges have longer numbers, and a batch of such rows alone is a bad guide.
run_find() {
    step "3. Full tuning on boxes, with finetune_ds.sh: $OUTPUT/full"
    tune finetune_ds.sh "$OUTPUT/base" boxes full --learning_rate 1e-3
    step "4. Held-out pictures, before and after"
    OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} python "$ROOT/demo/compare_boxes.py" "$OUTPUT"
}

run_listen() {
    step "3. Full tuning on sounds, the audio encoder included, with finetune_ds.sh: $OUTPUT/full"
    tune finetune_ds.sh "$OUTPUT/base" sounds full --learning_rate 1e-3 --train_sampling_strategy group_by_length --tune_audio true
    step "4. Singers that were never heard, before and after"
    OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} python "$ROOT/demo/compare.py" "$OUTPUT"
}

case $TASK in
    colors) run_two_stages ;;
    find) run_find ;;
    listen) run_listen ;;
esac

step "Ask it yourself; README.md says how to train on your own data"
picture=$(find "$OUTPUT/data" -name '*.png' | sort | head -n 1)
case $TASK in
    find)
        name=$(grep -o -m 1 '[a-z]* shape' "$OUTPUT/data/boxes_eval.json")
        case $GENERATION in
            xc2_*) ;;
            *) name="<ref>$name</ref>" ;;
        esac
        printf '"%s" "%s" --model_name_or_path "%s" --sampling false --image "%s" --question "%s" --draw "%s"\n' \
            "$VENV/bin/python" "$ROOT/finetune/chat.py" "$OUTPUT/full" "$picture" \
            "Where is the $name?" "$OUTPUT/found.png"
        ;;
    listen)
        printf '"%s" "%s" --model_name_or_path "%s" --sampling false --audio "%s" --question "%s"\n' \
            "$VENV/bin/python" "$ROOT/finetune/chat.py" "$OUTPUT/full" "$OUTPUT/data/clips/held_out_00000.wav" \
            "Which vowel is sung?"
        ;;
    *)
        printf '"%s" "%s" --adapter "%s" --sampling false --image "%s" --question "%s"\n' \
            "$VENV/bin/python" "$ROOT/finetune/chat.py" "$OUTPUT/lora" "$picture" "Describe the picture."
        ;;
esac
