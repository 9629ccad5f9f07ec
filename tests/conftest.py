"""Settings and fixtures of the whole suite.

JAX reads its settings from the environment when it is first imported, so they are set here, before any test module
is; the tests that need no JAX then never import it. The suite sees one CPU device: a test that needs more starts a
program of its own with `JAX_NUM_CPU_DEVICES` set.
"""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # [B] + [B,T] is a bug here, never a convenience
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool warns at every later fork
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked long (minutes each)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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
def smollm2() -> Path:
    """A Hugging Face folder of SmolLM2-135M: real weights and a real tokenizer."""
    if "REFT_SMOLLM2" not in os.environ:
        pytest.skip("set REFT_SMOLLM2 to a Hugging Face folder of SmolLM2-135M")
    return Path(os.environ["REFT_SMOLLM2"])
