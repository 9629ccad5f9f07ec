"""Runs programs that a model wrote, outside the training process. Imports nothing of this project."""

from .calls import Stream, run_programs, stream
from .pool import counts, shutdown, start
from .process import ExecResult, InfrastructureError, UnprotectedError

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
