"""benchmarks/gpu.sh: with a Python that only pretends, and, as a long test, at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import SHELLCHECK

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.sh"
SHAPES = ("Qwen2.5-Coder-0.5B", "CodeLlama-7b-hf")
PRETENDS = """#!/bin/bash
case "$*" in
  *find_spec*) echo "$MISSING" ;;
  *jax.devices*) ;;
  *CodeLlama*) echo "first line"; echo "RESOURCE_EXHAUSTED: 27 GB"; exit 3 ;;
  *shapes.py*) [[ "$*" != *--toy* ]] && echo '{}' > "$2" ;;
  *) echo "$@" ;;
esac
"""


def run(*arguments, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=590, env=os.environ | env, check=False
    )


def test_it_parses_and_says_how_it_is_called():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if SHELLCHECK:
        done = subprocess.run([SHELLCHECK, SCRIPT], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    for wrong in ((), ("--toy",), ("out", "--tiny"), ("out", "--toy", "more")):
        done = run(*wrong)
        assert done.returncode == 2 and done.stderr == "usage: benchmarks/gpu.sh OUT_DIR [--toy]\n"


def test_a_part_that_fails_is_one_line_and_the_others_run(tmp_path, monkeypatch):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PRETENDS)
    python.chmod(0o755)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    done = run(out, PYTHON=str(python), MISSING="flax optax")
    assert "platform cuda\n" in done.stdout
    lines = [line.split(", ")[0] for line in done.stdout.splitlines() if not line.startswith("platform")]
    assert done.returncode == 1 and done.stderr == ""
    assert lines[0].endswith(": flax optax; the parts that need them will fail")
    names = [
        "done    check",
        f"done    {SHAPES[0]}",
        f"FAILED  {SHAPES[1]}",
        "done    quickstart",
        f"results are in {out}",
    ]
    assert lines[1:] == names
    assert "exit code 3: RESOURCE_EXHAUSTED: 27 GB" in done.stdout and "first line" not in done.stdout
    written = {"check.txt", "missing.txt", "quickstart.txt", *(f"{name}.txt" for name in SHAPES), f"{SHAPES[0]}.json"}
    assert {path.name for path in out.iterdir()} == written
    assert "check --model=" in (out / "check.txt").read_text()


@pytest.mark.long
def test_it_works_at_toy_size(tmp_path):
    done = run(tmp_path, "--toy", PYTHON=sys.executable, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stdout
    assert "everything passed" in (tmp_path / "check.txt").read_text()
    for name in SHAPES:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["machine"]["versions"]["jax"] and found["toy"]
        assert found["decode"]["step_s"] > 0 and found["score"]["tokens_per_s"] > 0 and found["update"]["first_s"] > 0
    assert "ReFT" in (tmp_path / "quickstart.report.md").read_text()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1 << 20
