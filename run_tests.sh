#!/bin/sh
# Runs the tests, offline, in an environment of their own. Arguments are passed on to pytest:
#
#     bash run_tests.sh                 the quick tests: what must always pass
#     bash run_tests.sh --all           the slow tests too
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

# Two tests at a time, unless the arguments say otherwise or ask for output.
side_by_side='-n 2'
for word in "$@"; do
    case $word in -n* | -s | --pdb) side_by_side='' ;; esac
done

cd "$ROOT"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# shellcheck disable=SC2086  (no word, or two)
exec python -m pytest -m "$selection" $side_by_side "$@"
