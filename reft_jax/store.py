"""Writes files whole or not at all, and names the file that could not be written or read.

What differs between a disk and a bucket is decided here; bucket.py has a bucket's side of it. Four other files ask
whether a path is in a bucket, because what they do with it is their subject: flags that refuse one (commands/flags.py),
a folder that appears whole (model_folder.py), tensors (model/safetensors.py), a host's log (parallel/host_log.py).
"""

import errno
import fcntl
import hashlib
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reft_jax.types import InputError, SaveError

REMEDY = "make room or repair the disk, then run the same command again"
REMEDY_BUCKET = "see to the bucket, your rights in it and the network, then run the same command again"
WHOLE = "what was saved before is whole"
# Errors of the disk, not of the code: full, over a quota or a limit, read-only, broken, or without permission.
DISK = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EIO EACCES EPERM".split()}
PATIENCE_S = 180.0
TEXT = {"encoding": "utf-8", "errors": "replace"}


def as_path(text: str | Path) -> Path:
    """The path that a user wrote: of a disk, or of a bucket (`gs://bucket/…`).

    InputError for another store (`s3://…`), which would be a folder of this disk, and without the extra `gcs`.
    """
    if not is_remote(text):
        if found := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)):
            raise InputError(f"{text}: {found[0]} is not supported; give a path on a disk, or gs://…")
        return Path(text)
    try:
        from reft_jax.bucket import BucketPath
    except ImportError as error:
        raise InputError(f"{text}: a bucket needs more packages ({error}); run launch/venv.sh gcs") from error
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


def on_disk(file: Path) -> Path:
    """The file itself; of one in a bucket a copy in `local(file.parent)`, as it is now."""
    if not is_remote(file):
        return file
    here = local(file.parent) / file.name
    here.parent.mkdir(parents=True, exist_ok=True)
    here.write_bytes(file.read_bytes())
    return here


def settle() -> None:
    """What this process appended to files can be read by other processes afterwards. Raises SaveError."""
    if appends := sys.modules.get("reft_jax.appends"):
        with writing(Path("a file")):
            appends.settle()


def remove(path: Path, *, ignore_errors: bool = True) -> None:
    """Removes a folder with all that is in it. An error that is ignored leaves what takes room, nothing else."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=ignore_errors)
        return
    with suppress(*(OSError,) * ignore_errors):
        path.rmtree()


def copy(path: Path, target: Path) -> None:
    """Copies a file."""
    target.write_bytes(path.read_bytes()) if is_remote(target) else shutil.copy(path, target)


def published(folder: Path, marker: str = "manifest.json") -> bool:
    """Whether a folder that is written whole is there. On a disk its name appears last, in a bucket its marker."""
    return (folder / marker).exists() if is_remote(folder) else folder.exists()


def may_write(path: Path) -> bool:
    """Whether the file can be written, as far as that shows without writing: a bucket does not say."""
    return is_remote(path) or os.access(path, os.W_OK)


def why_not_writable(folder: Path) -> str:
    """Why nothing can be written in a folder that may be new, as far as that shows without writing; "" if it can."""
    if is_remote(folder):
        return "" if folder.has_bucket() else "there is no such bucket; make it first"
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return "" if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else f"{there} is not a writable folder"


def is_same(one: str, folder: Path) -> bool:
    """Whether a path as text is this folder. A folder of a disk that is gone counts as moved here."""
    if is_remote(one) or is_remote(folder):
        return one == str(folder)
    return not os.path.exists(one) or os.path.samefile(one, folder)


def sums(folder: Path) -> dict[str, tuple[int, str]] | None:
    """{relative name: (size, checksum)} of the files under a folder in a bucket, as the store knows them; else None."""
    return folder.sums() if is_remote(folder) else None


_stands: dict[Path, Path] = {}


def readable(folder: Path) -> Path:
    """The folder itself; for a model's folder in a bucket one on this machine that stands for it, without weights."""
    if not is_remote(folder):
        return folder
    from reft_jax.bucket import stand_in

    here = stand_in(folder)
    _stands[here] = folder
    return here


def origin(path: Path) -> Path:
    """Where the bytes of a file are: in a bucket if it is in a folder of `readable` that stands for one."""
    here = next((folder for folder in (path, *path.parents) if folder in _stands), None)
    return path if here is None else _stands[here] / path.relative_to(here)


def with_origins(text: str) -> str:
    """A message that names folders in a bucket instead of those that stand for them."""
    for here, folder in _stands.items():
        text = text.replace(str(here), str(folder))
    return text


def upload(folder: Path, target: Path) -> None:
    """Uploads a model's folder to a bucket. Raises SaveError."""
    from reft_jax.bucket import upload

    with writing(target):
        upload(folder, target)


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
    place = error.filename or path
    return SaveError(f"{place} could not be written ({error.strerror}); {WHOLE}: {remedy(place)}")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turns the errors of a bucket inside the `with` into SaveError: what does not answer is not wrong input.

    FileNotFoundError and the errors of a disk pass.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if not is_remote(path):
            raise
        raise not_reached(path, error) from error


def not_reached(path: Path | str, error: OSError) -> SaveError:
    """The SaveError for a bucket that does not answer."""
    return SaveError(f"{path} could not be reached ({error.strerror}); {WHOLE}: {REMEDY_BUCKET}")


def unforeseen(error: OSError) -> SaveError | None:
    """The SaveError for an error that nothing has expected; None if it is neither of the disk nor of a bucket."""
    if error.errno not in DISK:
        return None
    remote = is_remote(error.filename or "")
    return not_reached(error.filename, error) if remote else not_written("a file", error)


def remedy(path: Path | str) -> str:
    """What helps if a file cannot be written."""
    return REMEDY_BUCKET if is_remote(path) else REMEDY


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
    """The text of a file, without its byte order mark. InputError if it cannot be read or is not UTF-8; SaveError."""
    try:
        with reading(path):
            return as_path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def short_hash(text: str) -> str:
    """The first 16 hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


# --- a lock: a small file that several processes may want to replace


def swap(path: Path, before: str, after: str) -> bool:
    """Replaces the text `before` ("" for no file) with `after`; returns False if another process has changed it."""
    with writing(path):
        if is_remote(path):
            return path.swap(before, after)
        try:
            descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if after else 0), 0o666)
        except FileNotFoundError:
            return False
        with open(descriptor, "r+", **TEXT) as file:
            with suppress(OSError):  # without file locks, two processes that take over at one moment can both succeed
                fcntl.flock(file, fcntl.LOCK_EX)
            there = path.stat().st_ino if path.exists() else None
            if there != os.fstat(file.fileno()).st_ino or file.read() != before:
                return False
            if not after:
                path.unlink()
                return True
            file.seek(0)
            file.truncate()
            file.write(after)
            return True


def touch(path: Path, mine: str) -> None:
    """Sets the file's time to now. In a bucket it is written again, if its text is still `mine`."""
    if is_remote(path):
        path.swap(mine, mine)
    else:
        os.utime(path)


def worth_a_file(folder: str | Path) -> float:
    """Seconds of work that a file there must save. A disk is quick; each read of a bucket is a request."""
    return 0.5 if is_remote(folder) else 0.0


def patience(path: Path) -> float:
    """Seconds that the place of a file may be out of reach before a run ends. A disk's own errors end it."""
    return PATIENCE_S if is_remote(path) else math.inf


def silence(path: Path) -> float:
    """Seconds since the file was touched. Both times are from the file system's clock: hosts' clocks may differ."""
    try:
        if is_remote(path):
            return path.silence()
        with tempfile.TemporaryFile(dir=path.parent) as now:
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # released at this moment
        return 0.0
    except OSError:  # a full disk
        return time.time() - path.stat().st_mtime
