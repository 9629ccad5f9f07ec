"""Code that a user brings: an object named `path.py:NAME` in a setting. It runs in this process with all its rights."""

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from reft_jax.types import InputError

FORM = "path.py:NAME"


def show_torch() -> None:
    """Lets PyTorch be imported after all, where it is installed: main() hides it from libraries."""
    if "torch" in sys.modules and sys.modules["torch"] is None:
        del sys.modules["torch"]


def is_plugin(name: str) -> bool:
    """Whether a setting's value has the form `path.py:NAME`, and is not one of the names the package knows."""
    path, colon, _ = name.rpartition(":")
    return bool(colon) and path.endswith(".py")


def absolute(name: str) -> str:
    """A setting's value with the absolute path of its file if it has the form `path.py:NAME`; else as it is.

    An address (gs://…) stays as it is too: it is not a path, and `load` refuses it.
    """
    path, _, defined = name.rpartition(":")
    return f"{Path(path).absolute()}:{defined}" if is_plugin(name) and "://" not in path else name


def load(path_and_name: str, what: str) -> Any:
    """Return the object NAME that the file path.py defines.

    The file is run once per process: a second name of it, or the same one again, comes from the same module.

    Args:
        path_and_name: `path.py:NAME`; the path is absolute or relative to the current directory.
        what: the setting that names it, as "model.family"; each message begins with it.

    Raises: InputError, in one line, if the form is wrong, the file is missing or raises, or it does not define NAME.
    """
    path, _, name = path_and_name.rpartition(":")
    if not is_plugin(path_and_name) or not name:
        raise InputError(f"{what}={path_and_name!r} must be {FORM}: a Python file and a name that it defines")
    if not Path(path).is_file():
        raise InputError(f"{what}={path_and_name!r}: there is no file {path}; it must be a local file")
    module = _module(Path(path).resolve(), f"{what}: {path}")
    if not hasattr(module, name):
        raise InputError(f"{what}={path_and_name!r}: {path} does not define {name}")
    return getattr(module, name)


def _module(path: Path, where: str):
    """The module of the file, registered in sys.modules, as dataclasses and pickles need it."""
    name = "reft_plugin_" + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    show_torch()
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is a program: anything can be raised in it
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        message = str(error)
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines, message = [error.lineno], error.msg
        line = f", line {lines[-1]}" if lines else ""
        message = f"{type(error).__name__}: {' '.join(message.split())}"
        raise InputError(f"{where}{line}: {message}; correct the file") from error
    return module
