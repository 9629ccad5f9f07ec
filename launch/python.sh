#!/usr/bin/env bash
# Prints the path of a Python 3.11, 3.12 or 3.13. If there is none (python3 of a TPU VM may be 3.10), it first installs
# 3.12 into the home directory with uv, which pip installs.
#   PYTHON="$(launch/python.sh)" launch/venv.sh tpu
set -euo pipefail

for version in 3.12 3.13 3.11; do
  for name in "python$version" python3; do
    if [[ "$("$name" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" == "$version" ]]; then
      command -v "$name"
      exit 0
    fi
  done
done
echo "python.sh: no Python 3.11, 3.12 or 3.13 here; installing 3.12 for this user" >&2
{
  python3 -m pip --version >/dev/null 2>&1 || { sudo apt-get -qq update && sudo apt-get -qq install -y python3-pip; }
  python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.12
} >&2
python3 -m uv python find 3.12
