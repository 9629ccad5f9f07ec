#!/usr/bin/env bash
# GPUs under Slurm, one process per GPU. JAX learns from srun which processes belong together.
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh pipeline --config=… --workdir=…
# First, once, in the checkout: launch/venv.sh cuda. All nodes must see the checkout and --workdir.
#SBATCH --job-name=reft
#SBATCH --exclusive
#SBATCH --output=reft-%j.log
#SBATCH --open-mode=append
set -uo pipefail
# Slurm runs a copy of this file from another folder; the job starts in the folder where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit 1
export REFT_WAIT="${REFT_WAIT-1}" # the run that died may have been on another machine
restarts="${RESTARTS:-20}"

for ((attempt = 0; ; attempt++)); do
  srun --kill-on-bad-exit=1 .venv/bin/python -m reft_jax "$@"
  code=$?
  [[ $code -eq 0 || $code -eq 2 ]] && exit "$code"
  ((attempt < restarts)) || exit "$code"
  echo "slurm.sh: exit code $code; starts all processes again (restart $((attempt + 1)) of $restarts)" >&2
  sleep "${WAIT_S:-10}"
done
