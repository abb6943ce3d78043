#!/bin/sh
# Set up and run the tests: sh run_tests.sh [pytest arguments], e.g. `sh run_tests.sh -n 0 -m slow`.
# Two processes share the files of tests. Slow tests start processes of their own: -n 0 runs them one after another.
set -eu
cd "$(dirname "$0")"

REQUIREMENTS=requirements-dev.txt
. ./setup_env.sh

exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
