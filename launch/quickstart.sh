#!/usr/bin/env bash
# The whole chain on a small synthetic task, on a CPU: SFT warm-up, ReFT, sampling, voting, reranking, report.
#   ./launch/quickstart.sh                              into runs/quickstart; run again, it resumes
#   WORKDIR=/data/q ./launch/quickstart.sh --config.seed=7    elsewhere, with changed settings
#   JAX_PLATFORMS=cuda ./launch/quickstart.sh           on a GPU, after `launch/venv.sh cuda`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir="${WORKDIR:-runs/quickstart}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"  # large pages: XLA on a CPU takes fresh memory each step

extras=page # the charts of report.html
[[ "$workdir" != gs://* ]] || extras=page,gcs
launch/venv.sh "$extras"
echo "Results will be in $workdir: report.md, report.json, report.html, curves.png"
.venv/bin/python -m reft_jax pipeline --config=configs/quickstart.py --workdir="$workdir" "$@"
echo "docs/tutorial.md continues from here, with questions and a reward of your own."
