"""One undisturbed run, with which all tests of this folder compare."""

from pathlib import Path

import pytest
import starts


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Compiled programs of all runs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def reference(tmp_path_factory, cache) -> Path:
    """The work directory of a whole pipeline."""
    workdir = tmp_path_factory.mktemp("reference")
    done = starts.run("pipeline", workdir, cache)
    assert done.returncode == 0, done.stderr
    return workdir
