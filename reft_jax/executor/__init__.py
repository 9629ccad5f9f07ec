"""Runs programs that a model wrote, outside the training process. Imports nothing else of this package."""

from .calls import Stream, run_programs, stream
from .guards import Guard
from .pool import counts, guarding, shutdown, start
from .process import ExecResult, InfrastructureError, UnprotectedError

__all__ = [
    "ExecResult",
    "Guard",
    "InfrastructureError",
    "Stream",
    "UnprotectedError",
    "counts",
    "guarding",
    "run_programs",
    "shutdown",
    "start",
    "stream",
]
