"""Writes files whole or not at all, and names the file that could not be written or read."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reft_jax.types import InputError, SaveError

REMEDY = "make room or repair the disk, then run the same command again"
# Errors of the disk, not of the code: full, over a quota or a limit, read-only, broken, or without permission.
DISK = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EIO EACCES EPERM".split()}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of the disk inside the `with` into SaveError, which names the error's own file or else `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise not_written(path, error) from error


def not_written(path: Path | str, error: OSError) -> SaveError:
    """The SaveError for an error of the disk."""
    problem = f"{error.filename or path} could not be written ({error.strerror})"
    return SaveError(f"{problem}; what was saved before is whole: {REMEDY}")


def write_whole(path: Path, content: str | bytes, *, synced: bool = False) -> None:
    """Replaces a file in one go, so that a reader never sees half of it. Text becomes UTF-8. Raises SaveError.

    synced: the content is on the disk before the file gets its name, so that a power failure leaves the old file or the
    new one.
    """
    part = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                if synced:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def read_text(path: str | Path) -> str:
    """The text of a file, without its byte order mark. InputError if it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def short_hash(text: str) -> str:
    """The first 16 hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
