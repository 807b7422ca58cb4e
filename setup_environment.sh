# Sourced by demo.sh, run_tests.sh, and .ci/run, with ROOT set. Creates a virtual environment beside the README (or in
# $VENV), installs the requirement files named as arguments, and puts it first on PATH. What has been installed is not
# looked at again, so that the next start takes no time and needs no network.

VENV=${VENV:-$ROOT/.venv}

if [ ! -x "$VENV/bin/python" ]; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            BASE_PYTHON=$candidate
            break
        fi
    done
    if [ -z "${BASE_PYTHON:-}" ]; then
        echo "No Python 3.11 or newer on PATH (python3 is $(python3 --version 2>&1)). Install one." >&2
        exit 1
    fi
    echo "Creating a virtual environment in $VENV ..."
    if ! "$BASE_PYTHON" -m venv "$VENV"; then
        rm -rf "$VENV"
        echo "$BASE_PYTHON -m venv failed. On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
fi

for requirements in "$@"; do
    stamp=$VENV/installed-$(cat "$ROOT/finetune/requirements.txt" "$requirements" | cksum | tr ' ' '-')
    if [ ! -e "$stamp" ]; then
        echo "Installing ${requirements#"$ROOT"/} ..."
        if ! "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"; then
            echo "The installation failed (messages above). Run the same command again to continue." >&2
            exit 1
        fi
        : >"$stamp"
    fi
done

PATH=$VENV/bin:$PATH
export PATH
