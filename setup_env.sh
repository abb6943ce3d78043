# Sourced by the launchers: sets PYTHON to an interpreter that has the packages which the file REQUIREMENTS pins.
#
# An active virtual or conda environment is never changed: if packages are missing, the command that installs them is
# printed. Without one, .venv is made here. An interrupted installation resumes at the next start.

REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
# Waiting threads sleep. Spinning ones take many times as long where cores are shared.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# Libraries print their errors, without notices of what is deprecated and without progress bars.
export TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY-error}"
export PYTHONWARNINGS="${PYTHONWARNINGS-ignore::FutureWarning,ignore::DeprecationWarning}"
export HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TOKENIZERS_PARALLELISM=false # its threads do not survive a fork

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    PYTHON=$(command -v python || command -v python3)
    "$PYTHON" src/run/check_requirements.py "$REQUIREMENTS"
else
    PYTHON=.venv/bin/python
    STAMP=.venv/installed-$REQUIREMENTS
    # There is no .venv, or its interpreter was moved or removed.
    if ! "$PYTHON" -c '' 2> /dev/null; then
        for BASE in python3.11 python3.12 python3.13 python3 python; do
            "$BASE" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && break
            BASE=
        done
        if [ -z "$BASE" ]; then
            echo "Python 3.11 or newer with its venv module was not found; install it" >&2
            exit 1
        fi
        echo "Making .venv with $("$BASE" --version)" >&2
        [ -e .venv ] || rm -f .venv # a link whose target is gone
        "$BASE" -m venv --clear .venv
    fi
    # The interpreter counts too: another version does not see the packages of this one.
    if ! { "$PYTHON" --version && cat requirements.txt "$REQUIREMENTS"; } | cmp -s - "$STAMP"; then
        echo "Installing $REQUIREMENTS into .venv (once; it takes minutes)" >&2
        "$PYTHON" -c 'import pip' 2> /dev/null || "$PYTHON" -m ensurepip >&2
        "$PYTHON" -m pip install -q -r "$REQUIREMENTS" >&2
        { "$PYTHON" --version && cat requirements.txt "$REQUIREMENTS"; } > "$STAMP"
    fi
fi
