#!/usr/bin/env bash
# The paper's row of CodeLlama-7B on GSM8K programs, in order: training files from official GSM8K, SFT, the two
# self-training baselines, ReFT, samples, rerankers, the table, model cards. Run again, it resumes.
#   MODEL_DIR=DIR GSM8K=DIR ./launch/paper_gsm8k_python.sh --config.mesh.fsdp=8
#   WORKDIR=DIR …        folder for everything (default runs/gsm8k_python)
#   CONFIG=FILE:ARG …    another row (default configs/paper.py:gsm8k,python) of the same data
#   REFT_PYTHON=python3  an interpreter that has reft_jax, instead of .venv (`launch/venv.sh tpu` makes one for TPUs)
# MODEL_DIR holds CodeLlama-7b-hf/, GSM8K the official train.jsonl and test.jsonl. Other arguments go to every stage.
# To use the authors' own programs instead of those that `convert` makes: --config.data.train=…/gsm8k_python_sdp.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${MODEL_DIR:?name the folder that holds CodeLlama-7b-hf}" "${GSM8K:?name the folder of the official GSM8K files}"
workdir="${WORKDIR:-runs/gsm8k_python}"
if [[ -z "${REFT_PYTHON:-}" ]]; then
  launch/venv.sh
  REFT_PYTHON=.venv/bin/python
fi
settings=(
  --config="${CONFIG:-configs/paper.py:gsm8k,python}" --workdir="$workdir/run" --config.model.path="$MODEL_DIR/CodeLlama-7b-hf"
  --config.data.train="$workdir/train/gsm8k_python_sdp.json" --config.data.test="$workdir/test/gsm8k_questions.json"
)

reft() {
  echo "== $*"
  "$REFT_PYTHON" -m reft_jax "$@"
}
for split in train test; do
  [[ -d "$workdir/$split" ]] || reft convert gsm8k --in="$GSM8K/$split.jsonl" --out_dir="$workdir/$split"
done
reft sft "${settings[@]}" "$@"
reft self-train --kind=offline "${settings[@]}" "$@"
reft self-train --kind=online "${settings[@]}" "$@"
reft reft "${settings[@]}" "$@"
for model in sft self_train_offline self_train_online reft; do
  reft sample --model="$model" --split=test "${settings[@]}" "$@"
done
for model in sft reft; do # the authors rerank these two
  reft rerank --model="$model" "${settings[@]}" "$@"
done
reft evaluate "${settings[@]}" "$@"
for model in sft reft rerank_sft rerank_reft; do
  out="$workdir/export/$model"
  [[ -d "$out" ]] || reft export --model="$model" --out_dir="$out" "${settings[@]}" "$@"
done
