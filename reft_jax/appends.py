"""Appends to files in a bucket: an object cannot grow, so what is appended goes up in parts (see bucket.py)."""

import threading
import time
from functools import cache

UPLOAD_S = 5.0  # between two uploads


class Tail:
    """What this process appends to one file; it is the only process that does."""

    def __init__(self, path):
        """path: a BucketPath. Makes one object of the file and the parts that an earlier process left."""
        self.path, self._pending, self._lock = path, bytearray(), threading.Lock()
        content = path.read_bytes() if path.is_file() else b""
        path.put(content)
        path.remove_parts()
        self._generation, self._uploaded = path.stat().st_ino, len(content)
        self._error: OSError | None = None

    @property
    def length(self) -> int:
        return self._uploaded + len(self._pending)

    def append(self, content: bytes) -> None:
        """OSError if the last upload in the background failed."""
        with self._lock:
            error, self._error = self._error, None
            if error:
                raise error
            self._pending += content

    def upload(self) -> None:
        with self._lock:
            if self._pending:
                self.path.put_part(self._generation, self._uploaded, bytes(self._pending))
                self._uploaded += len(self._pending)
                self._pending.clear()

    def try_upload(self) -> None:
        try:
            self.upload()
        except OSError as error:
            self._error = error


_tails: dict[str, Tail] = {}


def tail_of(path) -> Tail | None:
    return _tails.get(str(path))


def forget(path) -> bool:
    """Drops what was appended to a file and not uploaded; whether this process appended to it."""
    return _tails.pop(str(path), None) is not None


def settle() -> None:
    """Uploads everything that was appended so far. OSError if the bucket does not answer."""
    for tail in list(_tails.values()):
        tail.upload()


@cache
def _start_uploads() -> None:
    def run() -> None:
        while True:
            time.sleep(UPLOAD_S)
            for tail in list(_tails.values()):
                tail.try_upload()

    threading.Thread(target=run, name="reft-uploads", daemon=True).start()


class Appending:
    """A file open for appending. A write is uploaded within UPLOAD_S, by `flush` or `close`, or before any marker."""

    def __init__(self, path):
        _start_uploads()
        self._path = path
        self._tail = _tails.get(str(path)) or _tails.setdefault(str(path), Tail(path))

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
