"""Settings and fixtures of the whole suite.

JAX reads its settings from the environment when it is first imported, so they are set here, before any test module
is. Tests that do not need JAX then never import it. The suite sees one CPU device: a test that needs more starts its
own process with `JAX_NUM_CPU_DEVICES` set. All processes of a suite share what they compile.

Without --long, XLA leaves out optimizations: about half of the suite's time went to optimizing code that runs once.
"""

import atexit
import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # [B] + [B,T] is a bug here, never a convenience
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool warns at every later fork
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="reft_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "PYTEST_XDIST_WORKER" not in os.environ and "--long" not in sys.argv:  # a worker has the environment of its parent
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at a flag that they no longer have
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", quick)

FIRST = ("test_hosts.py", "test_pipeline.py")  # the longest file, and the one that compiles what most others need


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked long (minutes each)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
    if config.getoption("--long"):
        return
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the datasets and the golden PPO iterations (`data/`, `golden/`)."""
    folder = Path(os.environ.get("REFT_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set REFT_SHARED to the folder that holds data/ and golden/")
    return folder


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest, shared: Path) -> Path:
    """A Hugging Face folder of SmolLM2-135M: real weights and a real tokenizer, made once from a package.

    It lies in pytest's cache, or where REFT_SMOLLM2 says.
    """
    if given := os.environ.get("REFT_SMOLLM2"):
        return Path(given)
    pytest.importorskip("torch", reason="making SmolLM2-135M needs torch: pip install -e .[test]")
    folder = request.config.cache.mkdir("smollm2") / "model"
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest runs in several processes, and one makes it
        made = subprocess.run(
            [sys.executable, shared / "tools" / "make_smollm2.py", folder], capture_output=True, text=True, check=False
        )
    if made.returncode:
        pytest.skip(f"SmolLM2-135M could not be made (a package index is needed): {made.stderr[-300:]}")
    return folder


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """A monkeypatch, and no zygote of the executor's from another test or left for the next."""
    from reft_jax.executor import shutdown

    shutdown()
    yield monkeypatch
    shutdown()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium of playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_api.sync_playwright() as playwright:
        path = path or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium: install Debian's package chromium, or run `playwright install chromium`")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run waits for its trackers as long as a slow machine needs."""
    from reft_jax.train import trackers

    monkeypatch.setattr(trackers, "LEAST_SECONDS", 60.0)
    monkeypatch.setattr(trackers, "MOST_SECONDS", 60.0)


@pytest.fixture
def impatient(monkeypatch):
    """gcsfs waits half a minute before it gives up: here a hundredth of that."""
    from emulator import needs_gcsfs

    needs_gcsfs()
    import asyncio

    import gcsfs.retry

    monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 100)))
