# Sourced by the launchers that train, which set SCRIPT, OUT_DIR and PROMPT_STYLE: starts SCRIPT in one process per GPU
# (src/run/launch.py reads GPU_NUM, NODE_NUM, NODE_RANK, MASTER_ADDR, MASTER_PORT, CONFIG and RESTARTS).

MODEL_NP=${MODEL_NP:-Qwen/Qwen2-Audio-7B-Instruct} # a folder of any name, or a name on the hub
DATA_FILE=${DATA_FILE:-data/AVQA/train_qa.data}

. ./setup_env.sh
exec "$PYTHON" src/run/launch.py "$SCRIPT" \
    --model_name_or_path "$MODEL_NP" \
    --data_file "$DATA_FILE" \
    --output_dir "$OUT_DIR" \
    --prompt_style "$PROMPT_STYLE" \
    "$@"
