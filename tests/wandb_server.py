"""A small server of Weights & Biases in this process: what a run of the installed client asks for, and what it sends.

    with serving(monkeypatch) as runs:  # the client finds it by its environment variables
        ...
    runs["run id"].history

It knows GraphQL operations by their names, and raises KeyError in the test's output for one that it does not know.
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Run:
    """What the server has of one run."""

    def __init__(self):
        self.starts, self.resumes = 0, 0  # those that asked first what is there
        self.history, self.files = [], {}  # a line of JSON per step; bytes by name
        self.config, self.summary, self.complete = "{}", "{}", False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client keeps its connection

    def do_GET(self):
        """The numbers of lines, for a test's other process."""
        self._reply([len(run.history) for run in self.server.runs.values()])

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = asked["query"].split("(")[0].split("{")[0].split()[1]
            self._reply({"data": getattr(self, operation)(asked.get("variables") or {})})
        else:
            if self.path.endswith("/file_stream"):
                self._stream(self.server.runs[self.path.split("/")[-2]], json.loads(body))
            self._reply({})  # also for telemetry

    def do_PUT(self):
        _, run, name = self.path.removeprefix("/").split("/", 2)
        self.server.runs[run].files[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self._reply({})

    def Viewer(self, given: dict) -> dict:
        teams = {"edges": []}
        return {"viewer": {"id": "1", "entity": "team", "username": "me", "email": "", "flags": "{}", "teams": teams}}

    def RunResumeStatus(self, given: dict) -> dict:
        if run := self.server.runs.get(given["name"]):
            run.resumes += 1
        return {"model": self._project(given) | {"bucket": self._bucket(given["name"]) if run else None}}

    def UpsertBucket(self, given: dict) -> dict:
        is_new = given["name"] not in self.server.runs
        run = self.server.runs.setdefault(given["name"], Run())
        run.starts += bool(given["displayName"])  # only the first call of a start has it
        run.config = given["config"] or run.config
        bucket = self._bucket(given["name"]) | {"project": self._project(given), "sweepName": None}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def CreateRunFiles(self, given: dict) -> dict:
        folder = f"http://{self.headers['Host']}/put/{given['run']}"
        files = [{"name": name, "uploadUrl": f"{folder}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _project(self, given: dict) -> dict:
        return {"id": "1", "name": given["project"], "entity": {"id": "1", "name": "team"}}

    def _bucket(self, name: str) -> dict:
        run = self.server.runs[name]
        same = dict.fromkeys(("id", "name", "displayName"), name)
        texts = {"summaryMetrics": run.summary, "config": run.config, "description": None, "notes": None, "tags": []}
        tails = {"historyTail": json.dumps(run.history[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
        return same | texts | tails | {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0}

    def _stream(self, run: Run, sent: dict) -> None:
        """Lines go where the client says: one that starts at 0 again writes over what is there."""
        files = sent.get("files") or {}
        if lines := files.get("wandb-history.jsonl"):
            run.history[lines["offset"] : lines["offset"] + len(lines["content"])] = lines["content"]
        if summary := files.get("wandb-summary.json"):
            run.summary = summary["content"][-1]
        run.complete = sent.get("complete", False)

    def _reply(self, value) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        """Prints what went wrong, except that a client was killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Run]]:
    """Runs the server and yields its runs by id; processes that are started inside send to it."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.runs = {}
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.1")  # seconds; the client's own is 15
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield server.runs
        finally:  # also after a failed test: otherwise the thread keeps the process alive
            server.shutdown()
            thread.join()
