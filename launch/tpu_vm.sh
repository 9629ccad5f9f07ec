#!/usr/bin/env bash
# Runs a command on every host of a TPU VM or pod slice, from a machine with gcloud. Needs in the environment: TPU (its
# name), ZONE, and for `setup`, if the run's files are not in a bucket, SHARE: an NFS export (Filestore: 10.0.0.2:/reft)
# that is mounted as /mnt/reft on every host.
#   launch/tpu_vm.sh setup                                          copies this checkout; Python, .venv and the share
#   launch/tpu_vm.sh start pipeline --config=… --workdir=gs://my-bucket/runs/7b …    starts it; this machine may be off
#   launch/tpu_vm.sh follow                                         the output of host 0; Ctrl-C does not stop the run
#   launch/tpu_vm.sh stop                                           asks every host to stop
#   DRY_RUN=1 launch/tpu_vm.sh …                                    prints the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}
run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
# on HOSTS COMMAND: on the hosts "all" or a number.
on() { run gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"; }

[[ -n "${TPU:-}" && -n "${ZONE:-}" ]] || die "set TPU and ZONE to the name and the zone of the TPU VM"
verb="${1:-}"
shift || true
case "$verb" in
  setup)
    archive="$(mktemp -d)/reft_jax.tar.gz"
    run tar --exclude='./.*' --exclude=./runs -czf "$archive" . # without .git, caches and environments
    run gcloud compute tpus tpu-vm scp "$archive" "$TPU:reft_jax.tar.gz" --zone="$ZONE" --worker=all
    on all "mkdir -p reft_jax && tar -xzf reft_jax.tar.gz -C reft_jax"
    if [[ -n "${SHARE:-}" ]]; then
      on all "sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common"
      on all "sudo mkdir -p /mnt/reft && { mountpoint -q /mnt/reft || sudo mount -t nfs $(printf %q "$SHARE") /mnt/reft; }"
    fi
    on all "cd reft_jax && launch/venv.sh tpu"
    ;;
  start)
    (($#)) || die "name the command, as launch/tpu_vm.sh start pipeline --config=… --workdir=gs://my-bucket/runs/7b"
    on all "cd reft_jax && { nohup setsid launch/host.sh $(printf '%q ' "$@")>host.log 2>&1 </dev/null & echo \$! >host.pid; }"
    ;;
  follow) on 0 "tail -n 50 -F reft_jax/host.log" ;;
  stop) on all "kill -TERM \"\$(cat reft_jax/host.pid)\"" ;;
  *) die "setup, start, follow or stop; see the first lines of this file" ;;
esac
