#!/usr/bin/env bash
# Runs the test suite in its own .venv. Arguments go to pytest.
#   ./launch/test.sh                       minutes on two cores
#   ./launch/test.sh --long                also the tests marked long
#   REFT_SMOLLM2=DIR ./launch/test.sh      also those on the real weights of SmolLM2-135M, from a Hugging Face folder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/venv.sh test
# Where PYTHONDONTWRITEBYTECODE is set, each of the hundred processes that tests start would compile the package.
.venv/bin/python -m compileall -q reft_jax
# Two processes; all tests of a file run in one of them, in the order of the files: the short ones are the last. Tests
# that measure time allow three times what they state.
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 "$@"
