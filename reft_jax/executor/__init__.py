"""Runs programs that a model wrote, outside the training process. Imports nothing of this project."""

from .pool import ExecResult, InfrastructureError, run_programs, shutdown, start

__all__ = ["ExecResult", "InfrastructureError", "run_programs", "shutdown", "start"]
