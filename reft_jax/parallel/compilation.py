"""Keeps what XLA compiles for later runs, and counts compilations, so that one in the middle of a run is noticed."""

import os
from pathlib import Path

import jax

from reft_jax.store import worth_a_file

COMPILE, LOWER = (f"/jax/core/compile/{name}_duration" for name in ("backend_compile", "jaxpr_to_mlir_module"))
_compiled, _seconds = [0], [0.0]


def _count(event: str, seconds: float, **_) -> None:
    if event == COMPILE:
        _compiled[0] += 1
    if event in (COMPILE, LOWER):
        _seconds[0] += seconds


jax.monitoring.register_event_duration_secs_listener(_count)


def compiles() -> int:
    """The number of functions that this process has compiled so far, or read from the kept ones."""
    return _compiled[0]


def compile_seconds() -> float:
    """Seconds spent on compiling or reading them. Tracing is left out, because nested traces would count twice."""
    return _seconds[0]


def keep_compiled(folder: Path) -> None:
    """Keeps compiled functions in `folder`, from where later processes read them. JAX's own variables come first."""
    at_least = worth_a_file(os.environ.get("JAX_COMPILATION_CACHE_DIR", folder))
    for name, value in (("compilation_cache_dir", str(folder)), ("persistent_cache_min_compile_time_secs", at_least)):
        if f"JAX_{name.upper()}" not in os.environ:
            jax.config.update(f"jax_{name}", value)
