"""How files are written: whole or not at all, and what cannot be written is named."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reft_jax.types import SaveError

# The disk's fault, not the program's: full, over a quota or a limit, read-only, broken, somebody else's.
DISK = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EIO EACCES EPERM".split()}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what the disk refuses raises SaveError, which names `path`, or the file that the error itself names."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise not_written(path, error) from error


def not_written(path: Path | str, error: OSError) -> SaveError:
    return SaveError(
        f"{error.filename or path} could not be written ({error.strerror}); what was saved before is whole: make room "
        "or repair the disk, then run the same command again"
    )


def write_whole(path: Path, text: str, *, synced: bool = False) -> None:
    """Replaces a file in one go: a reader never sees half of it. Raises SaveError.

    synced: the text is on the disk before the file gets its name, so a power failure leaves the old file or this one.
    """
    part = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                if synced:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
