#!/usr/bin/env bash
# Prints the path of the newest Python of 3.13, 3.12 and 3.11 that starts: on PATH, or one that pyenv or uv installed. If
# there is none (python3 of a TPU VM may be 3.10), it first installs 3.13 into the home directory with uv, which pip
# installs.
#   launch/python.sh 3.13 3.12      the first of these that is there; installs none, exit code 1 if there is none
set -euo pipefail
wanted=("$@")
((${#wanted[@]})) || wanted=(3.13 3.12 3.11)

for version in "${wanted[@]}"; do
  for name in "python$version" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python \
    "$(uv python find --no-project "$version" 2>/dev/null || true)"; do
    if [[ "$("$name" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" == "$version" ]]; then
      command -v "$name"
      exit 0
    fi
  done
done
if (($#)); then
  echo "python.sh: no Python $(printf "%s " "$@")here" >&2
  exit 1
fi
echo "python.sh: no Python 3.11, 3.12 or 3.13 here; installing 3.13 for this user" >&2
{
  python3 -m pip --version >/dev/null 2>&1 || { sudo apt-get -qq update && sudo apt-get -qq install -y python3-pip; }
  python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.13
} >&2
python3 -m uv python find 3.13
