# Sourced by the launchers: sets PYTHON to an interpreter that has what the file(s) in REQUIREMENTS pin.
#
# In an active virtual or conda environment nothing is changed: if it lacks something, the command that installs it is
# said. Without one, .venv is made here and filled; an interrupted installation goes on at the next start.

REQUIREMENTS=${REQUIREMENTS:-requirements.txt}
# Threads that wait for others sleep instead of spinning, which takes many times as long where cores are shared.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    PYTHON=$(command -v python || command -v python3)
    "$PYTHON" src/launch/check_requirements.py "$REQUIREMENTS"
else
    PYTHON=.venv/bin/python
    STAMP=.venv/installed-$REQUIREMENTS
    if ! cat requirements.txt "$REQUIREMENTS" 2>/dev/null | cmp -s - "$STAMP"; then
        if ! [ -x "$PYTHON" ]; then
            for BASE in python3.11 python3.12 python3.13 python3 python; do
                "$BASE" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
                BASE=
            done
            if [ -z "$BASE" ]; then
                echo "Python 3.11 or newer, with its venv module, is needed and was not found" >&2
                exit 1
            fi
            echo "Making .venv with $("$BASE" --version)" >&2
            "$BASE" -m venv .venv
        fi
        echo "Installing $REQUIREMENTS into .venv (once; it takes minutes)" >&2
        "$PYTHON" -m pip install -r "$REQUIREMENTS" >&2
        cat requirements.txt "$REQUIREMENTS" > "$STAMP"
    fi
fi
