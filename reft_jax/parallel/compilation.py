"""What XLA compiles: kept between runs, and counted, so that a program compiled in the middle of a run is seen."""

from pathlib import Path

import jax

COMPILE, LOWER = (f"/jax/core/compile/{name}_duration" for name in ("backend_compile", "jaxpr_to_mlir_module"))
_compiled, _seconds = [0], [0.0]


def _count(event: str, seconds: float, **_) -> None:
    if event == COMPILE:
        _compiled[0] += 1
    if event in (COMPILE, LOWER):
        _seconds[0] += seconds


jax.monitoring.register_event_duration_secs_listener(_count)


def compiles() -> int:
    """Programs that this process has compiled, or read from the kept ones, so far."""
    return _compiled[0]


def compile_seconds() -> float:
    """Seconds that it took to compile them, or to read them. Tracing is not in it: nested traces count twice."""
    return _seconds[0]


def keep_compiled(folder: Path) -> None:
    """Compiled programs are kept in `folder` and read from there by later processes."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
