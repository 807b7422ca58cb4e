#!/bin/bash
# One session on a GPU machine, see gpu_session.py; its arguments are passed on.
#
#     bash benchmarks/gpu_session.sh [--rows WORD ...] [--small]
#     WHEELS=wheels bash benchmarks/gpu_session.sh     on a machine without a network or our versions
#
# WHEELS is a folder made by prepare_wheels.py on another machine; nothing is installed into the machine's Python.
set -eu
cd "$(dirname -- "$0")/.."
PYTHON=${PYTHON:-python3}

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
"$PYTHON" benchmarks/gpu_session.py "$@"
