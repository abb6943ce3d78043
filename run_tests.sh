#!/bin/sh
# Set up and run the tests: sh run_tests.sh [pytest arguments], e.g. `sh run_tests.sh -m slow`.
set -eu
cd "$(dirname "$0")"

REQUIREMENTS=requirements-dev.txt
. ./setup_env.sh

exec "$PYTHON" -m pytest "$@"
