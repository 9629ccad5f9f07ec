"""One iteration of PPO passes few files: what a reader has to open between a question and its update."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_question_passes_at_most_twenty_files_before_its_update():
    command = [sys.executable, str(ROOT / "benchmarks" / "trace.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    *files, summary = done.stdout.splitlines()
    assert {"stages/reft.py", "stages/rollout.py", "engine/generate.py", "train/iteration.py"} <= set(files)
    assert len(files) <= 20, files
    assert summary.startswith(f"{len(files)} files, ")
