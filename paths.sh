# Sourced by the launchers first of all: paths in the environment are the user's, from wherever a launcher is called;
# afterwards the repository is the working directory.

ROOT=$(cd "$(dirname "$0")" && pwd -P)
for NAME in OUT_DIR MMAU_DIR DATA_FILE MODEL_NP CONFIG; do
    eval "VALUE=\${$NAME:-}"
    case $VALUE in
    "" | /*) continue ;;
    -*) VALUE=./$VALUE ;; # a folder, no flag
    esac
    # MODEL_NP may be a name on the hub, CONFIG one of conf/.
    case $NAME in
    MODEL_NP | CONFIG) [ -e "$VALUE" ] || continue ;;
    esac
    [ "$ROOT" = "$(pwd -P)" ] || VALUE=$PWD/$VALUE
    eval "$NAME=\$VALUE"
done
cd "$ROOT"
