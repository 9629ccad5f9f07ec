#!/usr/bin/env bash
# GPUs under Slurm, a process for each. JAX learns from srun who the others are.
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh pipeline --config=… --workdir=…
# First, once, where the checkout lies: launch/venv.sh cuda. The checkout and --workdir are folders that all nodes see.
#SBATCH --job-name=reft
#SBATCH --exclusive
#SBATCH --output=reft-%j.log
#SBATCH --open-mode=append
set -uo pipefail
# Slurm runs a copy of this file from elsewhere; the job starts in the folder where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit 1
restarts="${RESTARTS:-20}"

for ((attempt = 0; ; attempt++)); do
  srun --kill-on-bad-exit=1 .venv/bin/python -m reft_jax "$@"
  code=$?
  [[ $code -eq 0 || $code -eq 2 ]] && exit "$code"
  ((attempt < restarts)) || exit "$code"
  echo "slurm.sh: exit code $code; starts all again (restart $((attempt + 1)) of $restarts)" >&2
  sleep "${WAIT_S:-10}"
done
