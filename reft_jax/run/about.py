"""Says what made a result: versions and commit. Imports nothing large, so that `--version` answers at once."""

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

from reft_jax import __version__

PACKAGES = "jax jaxlib flax optax orbax-checkpoint transformers datasets numpy ml_collections".split()


@cache
def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the packages that numbers depend on."""
    ours = {"reft_jax": __version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in PACKAGES}


@cache
def commit() -> str:
    """The commit of this checkout, with "-dirty" appended if files have changed since; "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed, possibly inside another project's checkout
        return ""
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def made() -> dict[str, str]:
    """When a report was made and with which versions: its first lines."""
    found, of = versions(), f", commit {commit()}" if commit() else ""
    told = ", ".join(f"{name} {found[name]}" for name in ("jax", "jaxlib", "python"))
    return {"made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "with": f"reft_jax {found['reft_jax']}{of}, {told}"}
