"""Would the tests notice a mistake? Plants one-line mistakes, one at a time, and shows that a test fails for each.

    python tests/mutations.py                   all mistakes; exit code 1 if one is not noticed
    python tests/mutations.py gae               those whose name contains "gae"
    python tests/mutations.py --tests-passed    skip the first step, which shows that the tests pass without a mistake
    python tests/mutations.py --jobs=1          one process (default: 2)

No file is changed: a mutated module exists only in one process, which imports the package again for every
mutation. Separate processes read the modules of COPIED: these are mutated in a copy of the repository.
"""

import argparse
import importlib.abc
import importlib.util
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import REPO  # its import also sets the suite's environment: all processes share what they compile
from planted import executor, models, runs, training

TESTS = Path(__file__).resolve().parent
LIMIT_S = 600  # for the tests of one mistake, in a process of their own; most take seconds
# Nobody reads what a failed assertion compared, nor needs garbage collected between mistakes: each costs a second.
PYTEST = ["-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]


class Mutation(NamedTuple):
    """A mistake: `old`, which occurs once in `module`, becomes `new`; one of `tests` must fail."""

    name: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...]


COPIED = (
    "reft_jax.executor.", "reft_jax.tasks.reward_worker", "reft_jax.train.tracker", "reft_jax.train.services",
    "reft_jax.terminal",
)  # fmt: skip
MUTATIONS = [Mutation(*one) for part in (training, models, runs, executor) for one in part.PLANTED]


class Planted(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a source in memory."""

    def __init__(self, module: str, source: str, path: Path):
        self.module, self.source, self.path = module, source, path

    def find_spec(self, fullname, path, target=None):
        return (
            importlib.util.spec_from_loader(fullname, self, origin=str(self.path)) if fullname == self.module else None
        )

    def get_filename(self, fullname):
        return str(self.path)

    def get_data(self, path):
        return self.source.encode()


def forget() -> None:
    """Makes the next import of the package or of a test read it again. Large libraries stay imported."""
    for name in list(sys.modules):
        path = getattr(sys.modules[name], "__file__", None) or ""
        of_tests = path.startswith(f"{TESTS}{os.sep}") and path != str(Path(__file__).resolve())
        if name.partition(".")[0] == "reft_jax" or of_tests:
            del sys.modules[name]


def failing(tests) -> tuple[int, str]:
    """pytest's exit code for these tests, and what it printed; stops at the first failure."""
    forget()
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = pytest.main([*PYTEST, *(str(TESTS / test) for test in tests)])
    return int(code), said.getvalue()


def failing_in_copy(tests, name: Path, mutated: str) -> tuple[int, str]:
    """`failing` in a copy of the repository in which this file has the text `mutated`."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # tests run programs as another user
        copy = Path(folder)
        for part in ("reft_jax", "tests"):
            shutil.copytree(REPO / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / "pyproject.toml", copy)
        (copy / name).write_text(mutated)
        command = [sys.executable, "-m", "pytest", *PYTEST, *(str(copy / "tests" / test) for test in tests)]
        try:
            run = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return 124, f"not ended after {LIMIT_S} s"
        return run.returncode, run.stdout + run.stderr


def survives(mutation: Mutation) -> str:
    """Returns '' if a test failed, else what happened instead."""
    path = REPO / (mutation.module.replace(".", "/") + ".py")
    source = path.read_text()
    if source.count(mutation.old) != 1:
        return f"its text stands {source.count(mutation.old)} times in {path.name}; bring tests/mutations.py up to date"
    mutated = source.replace(mutation.old, mutation.new)
    if mutation.module.startswith(COPIED):
        code, said = failing_in_copy(mutation.tests, path.relative_to(REPO), mutated)
    else:
        planted = Planted(mutation.module, mutated, path)
        sys.meta_path.insert(0, planted)
        try:
            code, said = failing(mutation.tests)
        finally:
            sys.meta_path.remove(planted)
    if code == pytest.ExitCode.TESTS_FAILED:
        return ""
    return "NOT NOTICED" if code == pytest.ExitCode.OK else f"pytest ended with {code}: {said[-500:]}"


def timed(mutation: Mutation) -> tuple[Mutation, float, str]:
    """Returns a mutation, the seconds that it took, and the result of `survives`."""
    sys.dont_write_bytecode = True
    started = time.monotonic()
    problem = survives(mutation)
    return mutation, time.monotonic() - started, problem


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("wanted", nargs="?", default="")
    parser.add_argument("--tests-passed", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    chosen = [mutation for mutation in MUTATIONS if options.wanted in mutation.name]
    if not options.tests_passed:
        code, said = failing(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
        if code:
            print(f"the tests fail as they are:\n{said}")
            return 1
    unnoticed = 0
    # "spawn": a fork of a process that has imported JAX is not safe.
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for mutation, seconds, problem in pool.imap_unordered(timed, chosen):
            unnoticed += bool(problem)
            print(f"{seconds:5.1f} s  {mutation.name}: {problem or 'noticed'}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} mutations noticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
