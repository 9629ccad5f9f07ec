#!/usr/bin/env bash
# Makes or completes .venv with pinned versions and this package, installed in place. Does nothing if it is done.
#   launch/venv.sh                        what a run needs
#   launch/venv.sh test                   and an extra of pyproject.toml: test, smoke, docs, page, plan, cuda, tpu, gcs,
#                                         wandb, trackio, math
#   launch/venv.sh page,tpu               several extras
#   PYTHON=python3.12 launch/venv.sh      with that interpreter (default: what launch/python.sh finds)
#   VENV=.venv-3.12 launch/venv.sh        another folder than .venv
# Python 3.11 gets the pins of requirements.txt (JAX 0.10, the last one for it), a newer one those of
# requirements-newest.txt. uv installs if it is on PATH, else pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"
venv="${VENV:-.venv}"
stamp="$venv/installed-${extra:-run}"

die() {
  printf 'venv.sh: %s\n' "$@" >&2
  exit 1
}
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
# What the stamp must contain. The folder is in it because the package is installed in place: a moved checkout is
# installed again.
state() { printf '%s\n' "$PWD" && cat requirements*.txt pyproject.toml; }

make_venv() {
  local python version
  python="${PYTHON:-$(launch/python.sh)}"
  command -v "$python" >/dev/null || die "no $python on PATH; install Python 3.11, 3.12 or 3.13"
  version="$(version_of "$python")" || die "$python does not start; choose another one: PYTHON=python3.12 $0"
  case "$version" in
    3.11 | 3.12 | 3.13) ;;
    *) die "$python is Python $version, and 3.11, 3.12 or 3.13 is needed; choose one: PYTHON=python3.12 $0" ;;
  esac
  echo "Making $venv with Python $version"
  "$python" -m venv --clear "$venv" || die "could not make $venv (on Debian and Ubuntu: apt install python3-venv)"
}

if [[ ! -x "$venv/bin/python" ]]; then
  make_venv
elif [[ -n "${PYTHON:-}" && "$(version_of "$PYTHON")" != "$(version_of "$venv/bin/python")" ]]; then
  make_venv
elif cmp -s "$stamp" <(state); then
  exit 0
elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # stopped before pip was installed
  make_venv
fi

pins=requirements-newest.txt
[[ "$(version_of "$venv/bin/python")" != 3.11 ]] || pins=requirements.txt
install=("$venv/bin/python" -m pip install --disable-pip-version-check)
! command -v uv >/dev/null || install=(uv pip install --python "$venv/bin/python")
echo "Installing $pins into $venv${extra:+, with the extra \"$extra\"} (minutes the first time)"
"${install[@]}" --quiet -r "$pins" -e ".${extra:+[$extra]}" ||
  die "the installation failed, see above. The first one needs a network or a local package index." \
    "Then run the same command again: it resumes."
state >"$stamp"
[[ -z "$extra" ]] || cp "$stamp" "$venv/installed-run" # an extra comes on top of what a run needs
