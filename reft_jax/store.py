"""Writes files whole or not at all, and names the file that could not be written or read.

All of a path's differences between a disk and a bucket are here and in bucket.py.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reft_jax.types import InputError, SaveError

REMEDY = "make room or repair the disk, then run the same command again"
# Errors of the disk, not of the code: full, over a quota or a limit, read-only, broken, or without permission.
DISK = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EIO EACCES EPERM".split()}


def as_path(text: str | Path) -> Path:
    """The path that a user wrote: of a disk, or of a bucket (`gs://bucket/…`). InputError without the extra `gcs`."""
    if not is_remote(text):
        return Path(text)
    try:
        from reft_jax.bucket import BucketPath
    except ImportError as error:
        raise InputError(f"{text}: a bucket needs more packages ({error}); pip install 'reft_jax[gcs]'") from error
    return BucketPath(text)


def is_remote(path: str | Path) -> bool:
    """Whether a path is one of a bucket."""
    return str(path).startswith("gs://")


def local(folder: Path) -> Path:
    """The folder itself; for one in a bucket a folder of this machine that stands for it, and may be lost any time."""
    if not is_remote(folder):
        return folder
    return Path(tempfile.gettempdir()) / f"reft_jax_{os.getuid()}" / short_hash(str(folder))


def publish(file: Path, target: Path) -> None:
    """Uploads a file of `local(target.parent)`; nothing on a disk. Raises SaveError."""
    if file != target:
        write_whole(target, file.read_bytes())


def remove(path: Path, *, ignore_errors: bool = True) -> None:
    """Removes a folder with all that is in it. An error that is ignored leaves what takes room, nothing else."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    with suppress(*(OSError,) * ignore_errors):
        path.rmtree()


def copy(path: Path, target: Path) -> None:
    """Copies a file."""
    path.copy(target) if is_remote(path) else shutil.copy(path, target)


def published(folder: Path, marker: str = "manifest.json") -> bool:
    """Whether a folder that is written whole is there. On a disk its name appears last, in a bucket its marker."""
    return (folder / marker).exists() if is_remote(folder) else folder.exists()


def may_write(path: Path) -> bool:
    """Whether the file can be written, as far as that shows without writing: a bucket does not say."""
    return is_remote(path) or os.access(path, os.W_OK)


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
    if is_remote(path):
        with writing(path):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
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
