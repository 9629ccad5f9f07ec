"""Runs programs that a model wrote, outside the training process. Imports nothing of this project."""

from .pool import (
    ExecResult,
    InfrastructureError,
    Stream,
    UnprotectedError,
    counts,
    run_programs,
    shutdown,
    start,
    stream,
)

__all__ = [
    "ExecResult",
    "InfrastructureError",
    "Stream",
    "UnprotectedError",
    "counts",
    "run_programs",
    "shutdown",
    "start",
    "stream",
]
