"""A path in a bucket (`gs://…`) with the methods of pathlib.Path that a work directory uses. Needs the extra `gcs`.

A bucket has neither append nor rename. So:

- An object appears whole, or not at all. `write_bytes` first uploads what was appended to any file, so that a marker
  is never seen before the lines that were written before it.
- A file that is appended to is an object and numbered parts, `NAME.parts/GENERATION-OFFSET`. A part counts if it was
  made for the object's generation and begins where the content before it ends. So replacing the object drops all parts
  in one step, and a part that was uploaded twice is read once.
- A folder is renamed by copying its objects, its manifest last; the store copies, no byte comes here.
"""

import atexit
import errno
import io
import json
import os
import threading
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from functools import cache
from types import SimpleNamespace
from typing import Any

os.environ.setdefault(
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
)  # it asks another API about each bucket, for minutes

import fsspec  # noqa: E402
import gcsfs  # noqa: E402
from etils.epath import gpath  # noqa: E402

PARTS = ".parts"
MARKERS = ("manifest.json", "done.json")  # of a folder, copied last and removed first
UPLOAD_S = 5.0  # between two uploads of what was appended
for _name in ("gs", "gcs"):  # Orbax and JAX open their own file systems; other hosts' objects must be seen
    fsspec.config.conf.setdefault(_name, {})["use_listings_cache"] = False


@cache
def _store() -> gcsfs.GCSFileSystem:
    token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None
    return gcsfs.GCSFileSystem(token=token, use_listings_cache=False)


def _ask(path: "BucketPath", method: str, *args, **kwargs) -> Any:
    """Calls a method of the store. OSError if it does not answer; its own retries come first."""
    try:
        return getattr(_store(), method)(*args, **kwargs)
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:  # gcsfs and aiohttp have many classes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(errno.EIO, f"the bucket refuses or does not answer: {reason[:200]}", str(path)) from error


class BucketPath(gpath.PosixGPath):
    """A path of an object or of a folder of objects."""

    @property
    def _key(self) -> str:
        return str(self).removeprefix("gs://")

    def absolute(self) -> "BucketPath":
        return self

    def exists(self) -> bool:
        return _ask(self, "exists", self._key)

    def is_file(self) -> bool:
        return _ask(self, "isfile", self._key)

    def is_dir(self) -> bool:
        return _ask(self, "isdir", self._key)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there as soon as it has an object."""

    def rmdir(self) -> None:
        """Nothing: an empty folder is not there."""

    def iterdir(self) -> Iterator["BucketPath"]:
        return (self._at(name) for name in _ask(self, "ls", self._key, detail=False) if name.rstrip("/") != self._key)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        return (self._at(name) for name in sorted(_ask(self, "glob", f"{self._key}/{pattern}")))

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """All objects under this folder; only the pattern "*" is known."""
        assert pattern == "*"
        return map(self._at, _ask(self, "find", self._key))

    def _at(self, key: str) -> "BucketPath":
        return type(self)(f"gs://{key.rstrip('/')}")

    def stat(self) -> SimpleNamespace:
        """Size and times. The inode is the object's generation: it changes with every write."""
        info = self._info()
        changed = int(info["mtime"].timestamp() * 1e9)
        number = int(info["generation"])
        return SimpleNamespace(st_size=info["size"], st_ino=number, st_mtime_ns=changed, st_ctime_ns=changed)

    def _info(self) -> dict:
        info = _ask(self, "info", self._key)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return info

    # --- reading

    def read_bytes(self) -> bytes:
        """The object and its parts."""
        if tail := _tails.get(str(self)):
            tail.upload()
        while True:
            generation = self._info()["generation"]
            content = bytearray(_ask(self, "cat_file", self._key))
            for name, start in self._counted(generation):
                if start > len(content):
                    raise OSError(errno.EIO, f"its part before byte {start} is missing", str(self))
                if start == len(content):
                    content += _ask(self, "cat_file", name)
            if self._info()["generation"] == generation:
                return bytes(content)

    def _counted(self, generation: str) -> list[tuple[str, int]]:
        """Names and first bytes of the parts for this generation, in order."""
        found = [(name, *name.rpartition("/")[2].split("-")) for name in _ask(self, "find", self._key + PARTS)]
        return [(name, int(start)) for name, made_for, start in sorted(found) if made_for == generation]

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None):
        """Reads ("r", "rb") from memory; appends ("a", "ab"), or reads and then appends ("rb+"), line by line."""
        if mode in ("a", "ab", "rb+"):
            return Appending(self)
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: mode {mode!r}")
        content = io.BytesIO(self.read_bytes())
        return content if mode == "rb" else io.TextIOWrapper(content, encoding or "utf-8", errors)

    # --- writing

    def write_bytes(self, content: bytes) -> None:
        settle()
        _ask(self, "pipe_file", self._key, bytes(content))
        if _tails.pop(str(self), None):
            self._remove(_ask(self, "find", self._key + PARTS))

    def write_text(self, content: str, encoding: str | None = None, errors: str | None = None) -> None:
        self.write_bytes(content.encode(encoding or "utf-8", errors or "strict"))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            _ask(self, "rm_file", self._key)
        except FileNotFoundError:
            if not missing_ok:
                raise
        _tails.pop(str(self), None)

    def copy(self, target: "BucketPath") -> "BucketPath":
        """Copies the objects of a file (with its parts made one) or of a folder, its markers last."""
        if self.is_file():
            target.write_bytes(self.read_bytes())
            return target
        for name in sorted(_ask(self, "find", self._key), key=_is_marker):
            _ask(self, "cp_file", name, target._key + name.removeprefix(self._key))
        return target

    def rename(self, target: "BucketPath") -> "BucketPath":
        self.copy(target)
        self.rmtree()
        return target

    def rmtree(self, missing_ok: bool = True) -> None:
        """Removes a file with its parts, or a folder, its markers first."""
        parts = _ask(self, "find", self._key + PARTS)
        self._remove(sorted(_ask(self, "find", self._key), key=_is_marker, reverse=True) + parts)
        _tails.pop(str(self), None)

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self._at(name).unlink(missing_ok=True)

    # --- for a lock

    def swap(self, before: str, after: str) -> bool:
        """Replaces the text `before` ("" for no object, too) with `after`; False if another process has changed it.

        An answer may be lost after the store did what was asked; so a refusal is an error only if the text differs.
        """
        try:
            number, text = self._info()["generation"], self.read_text(errors="replace")
        except FileNotFoundError:
            number, text = "0", ""
        if text != before:
            return text == after != ""
        try:
            self._put(after, number)
        except FileExistsError:  # the generation is another one
            return self.read_text(errors="replace") == after != ""
        return True

    def _put(self, text: str, generation: str) -> None:
        """Writes the object if it has this generation, "0": if there is none."""
        bucket, _, name = self._key.partition("/")
        line, kinds = b"\r\n--part\r\n", (b"application/json", b"application/octet-stream")
        both = zip(kinds, (json.dumps({"name": name}).encode(), text.encode()), strict=True)
        body = b"".join(line + b"Content-Type: " + kind + b"\r\n\r\n" + data for kind, data in both) + b"\r\n--part--"
        _ask(
            self,
            "call",
            "POST",
            f"{_store()._location}/upload/storage/v1/b/{bucket}/o",
            uploadType="multipart",
            ifGenerationMatch=generation,
            headers={"Content-Type": "multipart/related; boundary=part"},
            data=body,
        )

    def silence(self) -> float:
        """Seconds since the object was written, by the store's clock (to a second)."""
        bucket, _, name = self._key.partition("/")
        headers, _ = _ask(self, "call", "GET", "b/{}/o/{}", bucket, name)
        return parsedate_to_datetime(headers["Date"]).timestamp() - self._info()["mtime"].timestamp()


def _is_marker(name: str) -> bool:
    return name.rpartition("/")[2] in MARKERS


class Tail:
    """What this process appends to one file; it is the only process that does."""

    def __init__(self, path: BucketPath):
        """Makes one object of the file and the parts that an earlier process left."""
        self.path, self._pending, self._lock = path, bytearray(), threading.Lock()
        content = path.read_bytes() if path.is_file() else b""
        _ask(path, "pipe_file", path._key, content)
        path._remove(_ask(path, "find", path._key + PARTS))
        self._generation, self._length = path._info()["generation"], len(content)
        self.error: OSError | None = None

    @property
    def length(self) -> int:
        return self._length + len(self._pending)

    def append(self, content: bytes) -> None:
        with self._lock:
            error, self.error = self.error, None
            if error:
                raise error
            self._pending += content

    def upload(self) -> None:
        with self._lock:
            if self._pending:
                part = f"{self.path._key}{PARTS}/{self._generation}-{self._length:015d}"
                _ask(self.path, "pipe_file", part, bytes(self._pending))
                self._length += len(self._pending)
                self._pending.clear()


_tails: dict[str, Tail] = {}


def settle() -> None:
    """Uploads everything that was appended so far. OSError if the bucket does not answer."""
    for tail in list(_tails.values()):
        tail.upload()


def _upload_again_and_again() -> None:
    while not _ended.wait(UPLOAD_S):
        for tail in list(_tails.values()):
            try:
                tail.upload()
            except OSError as error:
                tail.error = error  # the next append raises it


_ended = threading.Event()


@cache
def _start_uploads() -> None:
    threading.Thread(target=_upload_again_and_again, name="reft-uploads", daemon=True).start()
    atexit.register(_ended.set)


class Appending:
    """A file open for appending. A write is uploaded within UPLOAD_S, by `flush` or `close`, or before any marker."""

    def __init__(self, path: BucketPath):
        _start_uploads()
        self._path = path
        if str(path) not in _tails:
            _tails[str(path)] = Tail(path)
        self._tail = _tails[str(path)]

    def write(self, content: str | bytes) -> None:
        self._tail.append(content.encode() if isinstance(content, str) else content)

    def read(self) -> bytes:
        return self._path.read_bytes()

    def truncate(self, size: int) -> None:
        if size != self._tail.length:
            self._path.write_bytes(self._path.read_bytes()[:size])
            _tails[str(self._path)] = self._tail = Tail(self._path)

    def flush(self) -> None:
        self._tail.upload()

    def close(self) -> None:
        self.flush()

    def __enter__(self) -> "Appending":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
