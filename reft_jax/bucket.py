"""A path in a bucket (`gs://…`) with the methods of pathlib.Path that a run uses. Needs the extra `gcs`.

A bucket has neither append nor rename. So:

- An object appears whole, or not at all. `write_bytes` first uploads what was appended to any file, so that a marker
  is never seen before the lines that were written before it.
- A file that is appended to is an object and parts, `NAME.parts/GENERATION-OFFSET` (appends.py). A part counts if it
  was made for the object's generation and begins where the content before it ends. So replacing the object drops all
  parts in one step, and a part that was uploaded twice is read once.
- A folder is renamed by copying its objects, its marker last; the store copies, no byte comes here.
"""

import errno
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Otherwise gcsfs asks another API about each bucket, for minutes where there is none.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import fsspec
import gcsfs
from etils.epath import gpath

from reft_jax.appends import Appending, forget, settle, tail_of

PARTS = ".parts"
MARKERS = ("manifest.json", "done.json")  # of a folder, copied last and removed first
AT_ONCE = 8  # objects that are copied, removed or fetched
READS = 3  # of a file whose object is replaced meanwhile
BLOCK = 8 << 20  # bytes that are read ahead
FETCHED = 64 << 20  # the largest file that `stand_in` fetches
for _name in ("gs", "gcs"):  # Orbax and JAX open their own file systems; other hosts' objects must be seen
    fsspec.config.conf.setdefault(_name, {})["use_listings_cache"] = False
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also logs what it raises, with a stack


@cache
def _store() -> gcsfs.GCSFileSystem:
    token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None
    return gcsfs.GCSFileSystem(token=token, use_listings_cache=False, consistency="md5")


def _ask(path: "BucketPath", method: str, *args, **kwargs) -> Any:
    """Calls a method of the store. OSError if it does not answer; its own retries come first, for half a minute."""
    try:
        return getattr(_store(), method)(*args, **kwargs)
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:  # gcsfs and aiohttp have many classes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(errno.EIO, f"the bucket refuses or does not answer: {reason[:200]}", str(path)) from error


def _each(act: Callable[[str], Any], keys: Iterable[str]) -> list[Any]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(act, keys))


class BucketPath(gpath.PosixGPath):
    """A path of an object or of a folder of objects."""

    @property
    def _key(self) -> str:
        return str(self).removeprefix("gs://")

    @property
    def _place(self) -> tuple[str, str]:
        """Bucket, and name in it."""
        bucket, _, name = self._key.partition("/")
        return bucket, name

    def absolute(self) -> "BucketPath":
        return self

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self._about() is not None

    def is_dir(self) -> bool:
        return next(self._objects(self._key + "/", maxResults=1), None) is not None

    def has_bucket(self) -> bool:
        """Whether the bucket is there and may be listed. OSError if the store does not answer."""
        try:
            _ask(self, "call", "GET", "b/{}/o", self._place[0], maxResults=1, json_out=True)
        except FileNotFoundError:
            return False
        return True

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there as soon as it has an object."""

    def rmdir(self) -> None:
        """Nothing: an empty folder is not there."""

    def iterdir(self) -> Iterator["BucketPath"]:
        return self.glob("*")

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        first, _, rest = pattern.partition("/")
        found = {
            entry["name"].rstrip("/").rpartition("/")[2] for entry in self._objects(self._key + "/", delimiter="/")
        }
        for name in sorted(name for name in found if fnmatchcase(name, first) and not name.endswith(PARTS)):
            yield from (self / name).glob(rest) if rest else [self / name]

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """The objects under this folder whose last name matches."""
        return (self / name for name in self.sums() if fnmatchcase(name.rpartition("/")[2], pattern))

    def sums(self) -> dict[str, tuple[int, str]]:
        """{relative name: (size, CRC32C)} of every object under this folder, as the store computed them."""
        about = ((entry["name"], entry) for entry in self._objects(self._key + "/") if f"{PARTS}/" not in entry["name"])
        start = len(self._place[1]) + 1 if self._place[1] else 0  # a whole bucket is a folder, too
        return {name[start:]: (int(entry["size"]), f"crc32c {entry['crc32c']}") for name, entry in about}

    def _objects(self, prefix: str, **more) -> Iterator[dict]:
        """What the store says of objects whose key begins with `prefix`; with a delimiter also of folders."""
        (bucket, _, name), page = prefix.partition("/"), None
        while True:
            try:
                found = _ask(self, "call", "GET", "b/{}/o", bucket, prefix=name, pageToken=page, json_out=True, **more)
            except FileNotFoundError:  # no such bucket
                return
            # The console makes an object "folder/" for an empty folder.
            yield from (about for about in found.get("items", ()) if not about["name"].endswith("/"))
            yield from ({"name": name} for name in found.get("prefixes", ()))
            if not (page := found.get("nextPageToken")):
                return

    def _about(self) -> dict | None:
        """What the store says of this object; None if there is none."""
        bucket, name = self._place
        try:
            return _ask(self, "call", "GET", "b/{}/o/{}", bucket, name, json_out=True) if name else None
        except FileNotFoundError:
            return None

    def stat(self) -> SimpleNamespace:
        """Size and times. The inode is the object's generation: it changes with every write."""
        if (about := self._about()) is None:
            raise self._missing()
        changed, number = int(_written(about) * 1e9), int(about["generation"])
        return SimpleNamespace(st_size=int(about["size"]), st_ino=number, st_mtime_ns=changed, st_ctime_ns=changed)

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

    # --- reading

    def read_bytes(self) -> bytes:
        """The object and its parts."""
        if tail := tail_of(self):
            tail.upload()
        for _ in range(READS):
            try:
                headers, start = _ask(self, "call", "GET", _store().url(self._key))
            except FileNotFoundError:
                raise self._missing() from None
            content = bytearray(start)
            with suppress(FileNotFoundError):
                parts = self._counted(headers["X-Goog-Generation"])
                contents = _each(lambda key: _ask(self, "cat_file", key), parts)
                for begin, part in zip(parts.values(), contents, strict=True):
                    if begin > len(content):
                        break
                    if begin == len(content):
                        content += part
                else:
                    return bytes(content)
        raise OSError(errno.EIO, f"a part is missing after byte {len(content)}", str(self))

    def read_range(self, start: int, size: int) -> bytes:
        """Bytes of the object itself."""
        return _ask(self, "cat_file", self._key, start=start, end=start + size) if size else b""

    def _counted(self, generation: str) -> dict[str, int]:
        """{key: first byte} of the parts for this generation, in order."""
        found = [entry["name"].rpartition("/")[2].split("-") for entry in self._objects(self._key + PARTS + "/")]
        starts = sorted(int(start) for made_for, start in found if made_for == generation)
        return {self._key_of_part(generation, start): start for start in starts}

    def _key_of_part(self, generation: str | int, start: int) -> str:
        return f"{self._key}{PARTS}/{generation}-{start:015d}"

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        text = self.read_bytes().decode(encoding or "utf-8", errors or "strict")
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None):
        """Reads ("r", "rb"), appends ("a", "ab"), or reads and then appends ("rb+").

        An object without parts is read block by block.
        """
        if mode in ("a", "ab", "rb+"):
            return Appending(self)
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: mode {mode!r}")
        size = self.stat().st_size
        whole = next(self._objects(self._key + PARTS + "/", maxResults=1), None) is None
        content = io.BufferedReader(_Blocks(self, size), BLOCK) if whole else io.BytesIO(self.read_bytes())
        return content if mode == "rb" else io.TextIOWrapper(content, encoding or "utf-8", errors)

    # --- writing

    def write_bytes(self, content: bytes) -> None:
        settle()
        self.put(content)
        if forget(self):
            self.remove_parts()

    def put(self, content: bytes) -> None:
        """Writes the object alone. Parts of the one before do not count any more."""
        _ask(self, "pipe_file", self._key, bytes(content))

    def put_part(self, generation: int, start: int, content: bytes) -> None:
        _ask(self, "pipe_file", self._key_of_part(generation, start), content)

    def remove_parts(self) -> None:
        self._remove(f"{self._place[0]}/{entry['name']}" for entry in self._objects(self._key + PARTS + "/"))

    def write_text(self, content: str, encoding: str | None = None, errors: str | None = None) -> None:
        self.write_bytes(content.encode(encoding or "utf-8", errors or "strict"))

    def upload(self, file: Path) -> None:
        """Uploads a file of a disk, in pieces."""
        _ask(self, "put_file", str(file), self._key)

    def unlink(self, missing_ok: bool = False) -> None:
        forget(self)
        if not missing_ok and not self.is_file():
            raise self._missing()
        with suppress(FileNotFoundError):  # also if the answer to the first request was lost
            _ask(self, "call", "DELETE", "b/{}/o/{}", *self._place)

    def copy(self, target: "BucketPath") -> "BucketPath":
        """Copies a file, with its parts made one, or the objects of a folder, its marker last."""
        if self.is_file():
            target.write_bytes(self.read_bytes())
            return target
        markers, others = self._under()
        for names in (others, markers):
            _each(lambda name: _ask(self, "cp_file", name, target._key + name.removeprefix(self._key)), names)
        return target

    def rename(self, target: "BucketPath") -> "BucketPath":
        self.copy(target)
        self.rmtree()
        return target

    def rmtree(self) -> None:
        """Removes a file with its parts, or a folder, its marker first."""
        for names in self._under():
            self._remove(names)

    def _under(self) -> tuple[list[str], list[str]]:
        """Keys of this file and its parts, or of the objects under this folder: markers, others."""
        mine = (self._key, self._key + "/", self._key + PARTS + "/")
        bucket = self._place[0]
        keys = [f"{bucket}/{entry['name']}" for entry in self._objects(self._key)]
        keys = [key for key in keys if key == mine[0] or key.startswith(mine[1:])]
        markers = [key for key in keys if key.rpartition("/")[2] in MARKERS]
        return markers, [key for key in keys if key not in markers]

    def _remove(self, keys: Iterable[str]) -> None:
        _each(lambda key: type(self)(f"gs://{key}").unlink(missing_ok=True), keys)

    # --- for a lock

    def swap(self, before: str, after: str) -> bool:
        """Replaces the text `before` ("" for no object, too) with `after`; False if another process has changed it.

        An answer may be lost after the store did what was asked; so a refusal counts only if the text differs.
        """
        number = (self._about() or {"generation": "0"})["generation"]
        text = self.read_text(errors="replace") if number != "0" else ""
        if text != before:
            return text == after != ""
        try:
            self._put(after, number)
        except (FileExistsError, FileNotFoundError):  # the generation is another one
            return self.exists() and self.read_text(errors="replace") == after != ""
        return True

    def _put(self, text: str, generation: str) -> None:
        """Writes the object if it has this generation, "0": if there is none."""
        bucket, name = self._place
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
        try:
            headers, about = _ask(self, "call", "GET", "b/{}/o/{}", *self._place)
        except FileNotFoundError:
            raise self._missing() from None
        return parsedate_to_datetime(headers["Date"]).timestamp() - _written(json.loads(about))


def _written(about: dict) -> float:
    return datetime.fromisoformat(about["updated"]).timestamp()


class _Blocks(io.RawIOBase):
    """An object's bytes, for io.BufferedReader."""

    def __init__(self, path: BucketPath, size: int):
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer) -> int:
        found = self._path.read_range(self._at, max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


# --- model folders


_stands: dict[BucketPath, tempfile.TemporaryDirectory] = {}


def stand_in(folder: BucketPath) -> Path:
    """A folder on this machine, until this process ends, with the small files of `folder`.

    A *.safetensors file there has its size and its header only, and other large files their size only: they take no
    room, and `store.origin` says where their bytes are.
    """
    if folder not in _stands:
        _stands[folder] = tempfile.TemporaryDirectory(prefix="reft_jax_")
    here = Path(_stands[folder].name, folder._key)
    here.mkdir(parents=True, exist_ok=True)

    def fetch(name: str) -> None:
        path, size = folder / name, sizes[name][0]
        begin = size if size <= FETCHED else 0
        if name.endswith(".safetensors"):
            begin = min(size, 8 + int.from_bytes(path.read_range(0, min(size, 8)), "little"), FETCHED)
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        with (here / name).open("wb") as file:
            file.write(path.read_range(0, begin))
            file.truncate(size)

    sizes = folder.sums()
    _each(fetch, sizes)
    return here


def upload(source: Path, target: BucketPath) -> None:
    """Uploads the files of a folder, its config.json last: without it nobody takes the folder for a model."""
    paths = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name == "config.json")
    for path in paths:
        (target / path.relative_to(source)).upload(path)
