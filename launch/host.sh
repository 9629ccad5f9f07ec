#!/usr/bin/env bash
# Runs the command on one host, and starts it again if it fails. Whatever ends one host ends all of them with the same
# exit code within a minute. So each host may restart by itself, and all of them meet at the start.
#   launch/host.sh pipeline --config=… --workdir=…                       on every host of a TPU pod
#   launch/host.sh pipeline … --coordinator=10.0.0.1:8476 --num_processes=4 --process_id=0     elsewhere; 0, 1, 2, 3
#   RESTARTS=3 WAIT_S=60 launch/host.sh …                                 at most so many restarts, after so many seconds
# Ends with 0 when the command does, with 2 (wrong input) at once, and after SIGTERM or SIGINT when the command has ended.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export REFT_WAIT="${REFT_WAIT-1}" # the run that died may have been on another machine
restarts="${RESTARTS:-20}"
wait_s="${WAIT_S:-60}" # longer than the other hosts need to notice that one has died
python="${PYTHON:-.venv/bin/python}"
child="" asked=""

forward() {
  asked=1
  [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null
}
trap forward TERM INT

for ((attempt = 0; ; attempt++)); do
  "$python" -m reft_jax "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the command
    wait "$child"
    code=$?
  done
  child=""
  [[ $code -eq 0 || $code -eq 2 || -n "$asked" ]] && exit "$code"
  if ((attempt >= restarts)); then
    echo "host.sh: exit code $code; started $((attempt + 1)) times, no more restarts" >&2
    exit "$code"
  fi
  echo "host.sh: exit code $code; starts again in $wait_s s (restart $((attempt + 1)) of $restarts)" >&2
  sleep "$wait_s" &
  wait $!
  [[ -z "$asked" ]] || exit "$code"
done
