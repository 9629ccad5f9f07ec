#!/usr/bin/env bash
# The authors' table of CodeLlama-7B on GSM8K programs, from the five checkpoints that they released.
#   MODEL_DIR=DIR DATA=DIR/gsm8k_test_set.json ./launch/eval_released.sh --config.mesh.fsdp=8
#   WORKDIR=DIR …        folder for results and answers (default runs/released); run again, it resumes
#   REFT_PYTHON=python3  an interpreter that has reft_jax, instead of a .venv made here
# MODEL_DIR holds the folders Codellama-7b-hf-{SFT-warmup,SFT,SFT-Rerank,ReFT,ReFT-Rerank}-GSM8k (or -GSM8K) with
# safetensors files; `python -m reft_jax convert weights` makes them from .bin files. DATA is the authors' test file, or
# what `convert gsm8k` makes of the official test split. Other arguments go to `evaluate`.
# Greedy and 100 samples for 1,319 questions, two models: the cost has not been measured yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${MODEL_DIR:?name the folder that holds the released checkpoints}" "${DATA:?name the test file}"
workdir="${WORKDIR:-runs/released}"
if [[ -z "${REFT_PYTHON:-}" ]]; then
  launch/venv.sh
  REFT_PYTHON=.venv/bin/python
fi

released() {
  local folder
  for folder in "$MODEL_DIR/Codellama-7b-hf-$1-GSM8k" "$MODEL_DIR/Codellama-7b-hf-$1-GSM8K"; do
    if [[ -d "$folder" ]]; then
      echo "$folder"
      return
    fi
  done
  echo "eval_released.sh: no Codellama-7b-hf-$1-GSM8k in $MODEL_DIR; get lqtrung1998/Codellama-7b-hf-$1-GSM8k" >&2
  exit 2
}
warmup="$(released SFT-warmup)"
sft="$(released SFT)+$(released SFT-Rerank)"
reft="$(released ReFT)+$(released ReFT-Rerank)"

"$REFT_PYTHON" -m reft_jax evaluate --config=configs/paper.py:gsm8k,python --workdir="$workdir" \
  --models="SFT-warmup=$warmup,SFT=$sft,ReFT=$reft" --data="gsm8k=$DATA" "$@"
cat <<EOF

The authors' figures:   top-1   voting@100   rerank@100
            SFT-warmup  63.00
            SFT         63.68         68.0         77.0
            ReFT        75.28         78.0         81.2
EOF
