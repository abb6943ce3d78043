# Sourced first by the launchers: resolves relative paths in the environment against the user's working directory, then
# enters the repository.

ROOT=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd -P)
for NAME in OUT_DIR MMAU_DIR DATA_FILE MODEL_NP CONFIG; do
    eval "VALUE=\${$NAME:-}"
    case $VALUE in
    "" | /*) continue ;;
    -*) VALUE=./$VALUE ;; # otherwise it would be parsed as a flag
    esac
    # MODEL_NP may also be a name on the hub, and CONFIG a file of this repository.
    case $NAME in
    MODEL_NP | CONFIG) [ -e "$VALUE" ] || continue ;;
    esac
    [ "$ROOT" = "$(pwd -P)" ] || VALUE=$PWD/$VALUE
    eval "$NAME=\$VALUE"
done
cd "$ROOT"
