"""The executor where the kernel denies some protections: every set of them, as root and as another user."""

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from executor_tools import linux

TESTS = Path(__file__).resolve().parent
DENIED = str(TESTS / "denied.py")
FAMILIES = ("namespaces", "landlock", "seccomp")
NAMES = {"namespaces": "namespaces", "landlock": "Landlock", "seccomp": "seccomp"}
SECRET = "the-answer-is-271828"
USER = 12345
SUBSETS = [kept for size in range(4) for kept in itertools.combinations(FAMILIES, size)]
CORNERS = [
    (("namespaces", "landlock", "seccomp"), True),
    (("namespaces",), True),
    (("landlock",), False),
    (("seccomp",), True),
    ((), False),
]  # the protections that are left, whether as another user


@functools.cache
def python(another_user: bool) -> tuple[str, dict]:
    """A Python with this project's packages that this user, or another one, may run, and its environment."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    packages = next(path for path in map(Path, sys.path) if (path / "sympy").is_dir())
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), str(packages)])
    for found in (sys.executable, "/usr/bin/python3"):
        command = [found, "-c", "import sys; print(sys.version_info[:2]); import sympy"]
        if another_user:
            command = [sys.executable, DENIED, "none", f"--user={USER}", "--", *command]
        said = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
        if said.stdout.strip() == str(sys.version_info[:2]) and not said.returncode:
            return found, environment
    pytest.skip("there is no Python of this version that another user may run")


def denied(families, script: str, *words: str, another_user: bool = False, options=()) -> subprocess.CompletedProcess:
    """Runs a script of this folder, or the code after "-c", with these families of calls denied."""
    if another_user and os.getuid() != 0:
        pytest.skip("only root becomes another user")
    found, environment = python(another_user)
    user = [f"--user={USER}"] if another_user else []
    command = [sys.executable, DENIED, ",".join(families) or "none", *user, *options, "--", found]
    command += ["-c", *words] if script == "-c" else [str(TESTS / script), *words]
    environment = environment | {"SECRET": SECRET}
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300, check=False)


def corner(kept, another_user: bool, count: int, folder: Path) -> None:
    """Nothing is read that the start line does not say, no verdict is wrong, nothing is left."""
    answers = folder / "answers.txt"
    answers.write_text(SECRET)
    folder.chmod(0o755)
    answers.chmod(0o644)  # as open as a file can be
    missing = [family for family in FAMILIES if family not in kept]
    run = denied(missing, "executor_corner.py", str(count), str(answers), another_user=another_user)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    line = found["line"]
    for family in missing:
        assert NAMES[family] not in line
    if os.getuid() == 0 and not another_user:
        for family in kept:
            assert NAMES[family] in line
    assert SECRET not in json.dumps(found["memory"]), found["memory"]
    assert "long str" not in found["memory"]["environment"]
    assert (SECRET in json.dumps(found["files"])) == ("programs can read files" in line), found["files"]
    assert "programs can read files" in line or "landlock" in kept or "mount namespace" in line
    assert found["segments"] == []
    left = Path("/tmp/reft_test_leftover")  # what hostile programs try to make
    assert kept == () or not left.exists()
    left.unlink(missing_ok=True)
    assert found["wrong"] == [], found["wrong"][:3]


@linux
@pytest.mark.parametrize(("kept", "another_user"), CORNERS)
def test_corner(kept, another_user):
    with tempfile.TemporaryDirectory() as folder:
        corner(kept, another_user, 80, Path(folder))


@linux
@pytest.mark.long
@pytest.mark.parametrize("another_user", [False, True])
@pytest.mark.parametrize("kept", SUBSETS)
def test_every_corner(kept, another_user):
    with tempfile.TemporaryDirectory() as folder:
        corner(kept, another_user, 500, Path(folder))
