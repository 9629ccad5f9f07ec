#!/usr/bin/env bash
# Measures this project on one GPU in at most 9 minutes, without a network and without installing anything:
# a `check`; decoding, scoring and updates at the shapes of Qwen2.5-Coder-0.5B and CodeLlama-7B; the quickstart.
#   benchmarks/gpu.sh OUT_DIR                     on a machine without a GPU: toy sizes
#   benchmarks/gpu.sh OUT_DIR --toy               toy sizes in any case
#   PYTHON=python3.12 benchmarks/gpu.sh OUT_DIR
# Every part has a time limit of its own and writes into OUT_DIR as soon as it knows something. A part that fails says
# so in one line, and the others still run. Exit code: 0; 1 if a part failed; 2 for wrong arguments.
set -uo pipefail
if [[ $# -lt 1 || $# -gt 2 || "$1" == -* || "${2:---toy}" != --toy ]]; then
  echo "usage: benchmarks/gpu.sh OUT_DIR [--toy]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out="$(cd "$1" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"  # 7B's float32 state needs the room
failed=0

missing="$("$python" -c '
from importlib.util import find_spec
names = "jax flax optax orbax numpy ml_collections absl transformers tokenizers jinja2 sentencepiece datasets sympy"
print(*(name for name in [*names.split(), "tensorboardX", "matplotlib"] if find_spec(name) is None))' 2>&1)"
[[ -z "$missing" ]] || echo "missing in $python: $missing; the parts that need them will fail" | tee "$out/missing.txt"

# The platform is named, because JAX would also look for a TPU, and wait for one.
if [[ -z "${JAX_PLATFORMS:-}" ]]; then
  JAX_PLATFORMS=cuda "$python" -c 'import jax; jax.devices()' >/dev/null 2>&1 && JAX_PLATFORMS=cuda
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
toy="${2:-}"
[[ "$JAX_PLATFORMS" != cpu ]] || toy=--toy
echo "platform $JAX_PLATFORMS${toy:+, toy sizes}"

# part NAME SECONDS COMMAND…: runs it with a time limit, its output in OUT_DIR/NAME.txt. SIGKILL reaches all of its
# processes at once: after SIGTERM a stage would go on to a point where it can save, and slow the next part.
part() {
  local name="$1" limit="$2" begun=$SECONDS code=0
  shift 2
  { timeout --signal=KILL "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?; } 2>/dev/null  # where bash says "Killed"
  if ((code == 0)); then
    echo "done    $name, $((SECONDS - begun)) s"
  else
    failed=1
    local why
    why="$(tail -n 1 "$out/$name.txt" | cut -c -200)"
    ((code == 137)) && why="over its limit of $limit s; last line: $why"
    echo "FAILED  $name, $((SECONDS - begun)) s, exit code $code: $why"
  fi
}

config=(--config=configs/quickstart.py "--config.compiled=$work/compiled")
config+=(--config.executor.allow_unsandboxed)  # only programs of the toy's own model run
few=(--config.toy.train_rows=256 --config.toy.dev_rows=16 --config.toy.test_rows=16)
few+=(--config.sft.epochs=3 --config.sft.warmup_epoch=1 --config.sft.eval_every=3)
tiny=()
if [[ -n "$toy" ]]; then
  few+=(--config.data.pad_multiple=128)  # one length of rows: fewer functions to compile
  tiny=("${few[@]}" --config.rl.iterations=2 --config.rl.questions=32 --config.rl.eval_every=2 --config.sample.n=2)
  tiny+=(--config.sample.train_n=2 --config.sample.train_limit=32 --config.rerank.epochs=1)
fi

# shellcheck disable=SC2016  # the inner shell expands these
part check 100 bash -euc 'python="$1" work="$2"; shift 2
"$python" -m reft_jax sft "$@" --workdir="$work/few"
"$python" -m reft_jax export "$@" --workdir="$work/few" --model=sft --out_dir="$work/model"
"$python" -m reft_jax check --model="$work/model" "$@" --config.model.dtype=bfloat16' \
  check "$python" "$work" "${config[@]}" "${few[@]}"
for shape in Qwen2.5-Coder-0.5B:100 CodeLlama-7b-hf:150; do
  name="${shape%:*}"
  # shellcheck disable=SC2086  # no argument if $toy is empty
  part "$name" "${shape#*:}" "$python" benchmarks/shapes.py "$out/$name.json" "configs/models/$name.json" $toy
done
part quickstart $((520 - SECONDS)) "$python" -m reft_jax pipeline "${config[@]}" "${tiny[@]}" --workdir="$work/quickstart"
for file in report.md report.json versions.json sft/metrics.jsonl reft/metrics.jsonl; do
  [[ ! -f "$work/quickstart/$file" ]] || cp "$work/quickstart/$file" "$out/quickstart.${file//\//.}"
done
echo "results are in $out, $SECONDS s"
exit "$failed"
