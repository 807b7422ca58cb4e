#!/bin/sh
# Runs the test suite, offline, in its own environment. Arguments are passed on to pytest:
#
#     bash run_tests.sh                 what must always pass
#     bash run_tests.sh --all           the slow tests as well
#     bash run_tests.sh -k launchers    one subject
set -eu
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

selection='not slow'
if [ "${1:-}" = --all ]; then
    selection=''
    shift
fi
# Everything after the dot belongs to the sourced script, so the arguments for pytest wait in a function.
prepare() { . "$ROOT/setup_environment.sh"; }
prepare "$ROOT/finetune/requirements.txt" "$ROOT/tests/requirements.txt"

cd "$ROOT"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest -m "$selection" "$@"
