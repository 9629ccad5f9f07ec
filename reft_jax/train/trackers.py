"""Where the numbers of a stage go: trackers, chosen by the setting `tracking`.

`tracking` is a list with commas between: names of TRACKERS, and `path.py:NAME` for a Tracker of a user's own. `jsonl`
is always needed: a stage that resumes reads it. With several hosts only the first one has trackers.
"""

import atexit
import importlib.util
import json
import os
import queue
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Protocol

from reft_jax import plugins
from reft_jax.config import flatten, nearest
from reft_jax.parallel.hosts import is_first
from reft_jax.store import local, on_disk, publish, reading, write_whole, writing
from reft_jax.tasks.rewards import environment
from reft_jax.train.metrics import FILE, JsonLines, read_metrics
from reft_jax.train.progress import remark
from reft_jax.train.services import SERVICES, SYNC
from reft_jax.train.tracker_process import MAKE
from reft_jax.types import InputError

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter

KNOWN = "tracking.json"
LOG = "trackers.log"  # what trackers outside the work directory print
DEFAULT = "jsonl,tensorboard"
METHODS = ("open", "log", "file", "close")


class Tracker(Protocol):
    """Takes the numbers of one stage. It is made with the stage's folder, `NAME(folder)`, before anything is logged.

    A tracker other than jsonl and tensorboard cannot end or slow a run: it lives in a process of its own (see Guarded).

    It gets each step once. A resumed run computes the steps after its checkpoint again. Those that were logged before
    are not logged a second time, unless the tracker has a method `rewind(step)`: a resumed run calls it, it must forget
    every later step, and these steps are then logged again.
    """

    def open(self, run_id: str, config: dict[str, Any]) -> None:
        """Called once per start; `run_id` stays the same when the stage resumes.

        config: flat, {"rl.kl_coef": 0.01, …}.
        """

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of one step. They may be NaN or infinite."""

    def file(self, path: Path) -> None:
        """Called with `metrics.jsonl` before `close`. After a stop the file is not complete: a resume appends to it."""

    def close(self) -> None:
        """Called once, at the end or when the run is stopped."""


class TensorBoard:
    """The tracker `tensorboard`: a file of events in `tb/` of the stage's folder. Raises SaveError.

    The caller's thread writes the file. A thread of the library would end on a full disk, and the run would then wait
    forever for a free place in that thread's queue.
    """

    FLUSH_SECONDS = 30.0

    def __init__(self, folder: Path):
        self._folder = folder / "tb"
        self._local = local(self._folder)
        self._file: RecordWriter | None = None  # made by the first `log`, because `rewind` may be called before
        self._purge_step: int | None = None

    def open(self, run_id: str, config: dict[str, Any]) -> None:
        pass

    def rewind(self, step: int) -> None:
        """TensorBoard will hide the later events of older files."""
        self._purge_step = step + 1

    def log(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # here: its package takes a fifth of a second
        from tensorboardX.proto.summary_pb2 import Summary

        if self._file is None:
            self._begin()
        points = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(Event(step=step, wall_time=time.time(), summary=Summary(value=points)))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            with writing(self._folder):
                self._file.flush()
                publish(self._path, self._folder / self._path.name)
            self._flushed = time.monotonic()

    def file(self, path: Path) -> None:
        pass

    def close(self) -> None:
        if self._file is not None:
            with writing(self._folder):
                self._file.close()
                publish(self._path, self._folder / self._path.name)

    def _begin(self) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        # Nanoseconds: otherwise a quick restart would overwrite the previous file.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        with writing(self._folder):
            self._local.mkdir(parents=True, exist_ok=True)
            self._path = self._local / name
            self._file, self._flushed = RecordWriter(str(self._path)), time.monotonic()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._purge_step is not None:
            self._write(Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: "Event") -> None:
        with writing(self._folder):
            self._file.write(event.SerializeToString())


TRACKERS = {"tensorboard": TensorBoard, "jsonl": JsonLines}


def load_trackers(setting: str) -> dict[str, Callable[[Path], Tracker]]:
    """By name, what makes each tracker of the setting `tracking`. InputError if one is unknown or incomplete."""
    found = {name: _maker(name, f"tracking={setting!r}") for name in map(str.strip, setting.split(","))}
    if "jsonl" not in found:
        raise InputError(f"tracking={setting!r}: jsonl is missing, and a run resumes from it; write jsonl,{setting}")
    return found


def _maker(name: str, where: str) -> Callable[[Path], Tracker]:
    if name in TRACKERS:
        return TRACKERS[name]
    if name in SERVICES:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{where}: {name} is not installed; run launch/venv.sh {name}, or leave {name} out")
        return SERVICES[name]
    if not plugins.is_plugin(name):
        known = [*TRACKERS, *SERVICES]
        raise InputError(
            f"{where}: {name!r} is not known; did you mean {nearest(name, known)!r}? Known are {', '.join(known)}, and "
            f"{plugins.FORM} of a file of your own"
        )
    made = plugins.load(name, "tracking")
    absent = [method for method in METHODS if isinstance(made, type) and not hasattr(made, method)]
    if absent or not callable(made):
        what = f"has no method {', '.join(absent)}" if absent else "is not a class"
        raise InputError(f"{where}: {name} {what}; see Tracker in reft_jax/train/trackers.py")
    return made


class Guarded:
    """A tracker that cannot stop or slow a run: it lives in a process of its own, and a thread passes the calls to it.

    Its first exception, or a call that takes longer than CALL_SECONDS, becomes one warning, and it is switched off: its
    process is killed, and no further call is kept. Nothing waits for it before the end of the process (`deliver`).
    """

    CALL_SECONDS = 60.0

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self._local = local(folder)  # its files go there, and it gets this folder
        self._on, self._queue, self._process, self._lock = True, queue.SimpleQueue(), None, threading.Lock()
        self(MAKE)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        _ALL.append(self)
        self._thread.start()

    def __call__(self, method: str, *args, again: bool = False) -> None:
        """Queues one call and returns at once. again: a step logged before a resume, for trackers that can rewind."""
        if self._on:
            self._queue.put((method, args, again))

    def close(self) -> None:
        """Queues the last call, and returns at once."""
        self("close")
        self._queue.put(None)

    def wait(self, seconds: float) -> bool:
        """Whether everything is delivered, or it is switched off, within so many seconds."""
        self._queue.put(None)  # of a stage that did not close it
        self._thread.join(max(0.0, seconds))
        return not (self._on and self._thread.is_alive())

    def switch_off(self) -> None:
        """Ends the process, whatever it does."""
        with self._lock:
            self._on = False
            if self._process and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)  # and what its library started

    def _work(self) -> None:
        try:
            self._start()
            while (call := self._queue.get()) and self._on:
                if failed := self._answer(call):
                    self._fail(failed)
        except Exception as error:  # no process, no disk, or the process has ended
            self._fail(" ".join(f"{type(error).__name__}: {error}".split()))
        finally:
            if self._process:
                with suppress(OSError):
                    self._process.stdin.close()  # so it ends
                self._process.wait()
                self._process.stdout.close()
            _ALL.remove(self)

    def _start(self) -> None:
        self._local.mkdir(parents=True, exist_ok=True)
        with self._lock, (self._local / LOG).open("ab") as log:
            if self._on:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "reft_jax.train.tracker_process", self.name, str(self._local)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the run
                    env=environment(),
                )

    def _answer(self, call: tuple) -> str:
        """What went wrong in one call; "" if nothing did."""
        method, args, again = call
        args = [on_disk(one) if isinstance(one, PurePath) else one for one in args]
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        self._process.stdin.write(json.dumps([method, args, again], default=str).encode() + b"\n")
        self._process.stdin.flush()
        if not poll.poll(1000 * self.CALL_SECONDS):
            return f"a call took longer than {self.CALL_SECONDS:g} s"
        return json.loads(self._process.stdout.readline() or '"its process has ended"')

    def _fail(self, reason: str) -> None:
        if self._on:
            self.switch_off()
            remark(f"warning: tracker {self.name} is switched off, the run continues without it ({reason})")


_ALL: list[Guarded] = []
_BEGAN = time.monotonic()
LEAST_SECONDS, MOST_SECONDS, SHARE = 1.5, 10.0, 0.005  # of the wait at the end of the process; SHARE of its time


@atexit.register
def deliver() -> None:
    """Waits a while for the trackers outside the work directory; then one warning names those that are not done.

    A process does it once, at its end. It waits for SHARE of its time, but at least LEAST_SECONDS and at most
    MOST_SECONDS, and for nobody who has nothing left to do.
    """
    seconds = min(MOST_SECONDS, max(LEAST_SECONDS, SHARE * (time.monotonic() - _BEGAN)))
    end = time.monotonic() + seconds
    if late := [one for one in list(_ALL) if not one.wait(end - time.monotonic())]:
        for one in late:
            one.switch_off()
        told = ", ".join(f"{one.name} of {one.folder.name}" for one in late)
        hints = dict.fromkeys(SYNC[one.name].format(local(one.folder)) for one in late if one.name in SYNC)
        remark(
            f"warning: trackers that were not done {seconds:.2g} s after the end lack the last numbers: {told}; "
            f"{FILE} has them all{''.join(f'; {hint}' for hint in hints)}"
        )


class Results:
    """The trackers outside a work directory, for its results: a run of their own.

    It opens them at once, because that may take seconds; `close` passes the rest. Raises InputError.
    """

    def __init__(self, folder: Path, config, versions: dict[str, str]):
        names = [name for name in load_trackers(config.tracking) if name not in TRACKERS] if is_first() else []
        self._others = [Guarded(name, folder) for name in names]
        self._folder, self._known = folder, _read_known(folder) if names else {}
        for tell in self._others:
            tell("open", self._known["run_id"], _described(config, versions))

    def close(self, numbers: dict[str, float], paths: list[Path]) -> None:
        """Passes the table's numbers and the files. Step n is the n-th evaluation. Raises SaveError."""
        if self._others:
            self._known["logged"] += 1
            write_whole(self._folder / KNOWN, json.dumps(self._known) + "\n")
        for tell in self._others:
            tell("log", self._known["logged"], numbers)
            for path in paths:
                tell("file", path)
            tell.close()


def _described(config, versions: dict[str, str]) -> dict[str, Any]:
    return flatten(config) | {f"versions.{name}": version for name, version in versions.items()}


def _read_known(folder: Path) -> dict:
    path = folder / KNOWN
    try:
        with reading(path):
            known = json.loads(path.read_text(encoding="utf-8"))
        return {"run_id": str(known["run_id"]), "logged": int(known["logged"])}
    except FileNotFoundError:
        known = {"run_id": f"{folder.parent.name}-{folder.name}-{secrets.token_hex(4)}", "logged": 0}
        write_whole(path, json.dumps(known) + "\n")
        return known
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}); restore it from a copy or remove it") from error


class MetricsWriter:
    """The trackers of one stage. A context.

        with MetricsWriter(workdir / "reft", config) as metrics:
            metrics.truncate_after(restored_step)  # when resuming
            metrics.write(step, {"reward": reward, "kl": kl})

    `tracking.json` in the stage's folder keeps the run id, and the highest step that was logged before a resume.
    """

    def __init__(self, folder: Path, config=None, versions: dict[str, str] | None = None):
        """Opens the trackers of `config.tracking`; without a config, DEFAULT. Raises InputError, SaveError.

        versions: of packages; the trackers get them with the config, as `versions.NAME`.
        """
        flat = {} if config is None else _described(config, versions or {})
        makers = load_trackers(flat.get("tracking", DEFAULT))
        self._folder, self._ours, self._others = folder, [], []
        if not is_first():
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._known = _read_known(folder)
        # Ours come first: then metrics.jsonl has every step that a user's own tracker was given, also after a kill.
        self._ours = [TRACKERS[name](folder) for name in TRACKERS if name in makers]
        self._others = [Guarded(name, folder) for name in makers if name not in TRACKERS]
        for tracker in self._ours:
            tracker.open(self._known["run_id"], flat)
        for tell in self._others:
            tell("open", self._known["run_id"], flat)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values (anything that `float` takes) of one step. Raises SaveError."""
        step, numbers = int(step), {name: float(value) for name, value in values.items()}
        for tracker in self._ours:
            tracker.log(step, numbers)
        for tell in self._others:
            tell("log", step, numbers, again=step <= self._known["logged"])

    def truncate_after(self, step: int) -> None:
        """Forgets every later step, for a run that resumes at `step` and computes them again; call it before `write`.

        Raises InputError if a line of metrics.jsonl, other than an incomplete last line, is not a JSON object of
        numbers with a step.
        """
        if self._others:
            logged = max([int(line["step"]) for line in read_metrics(self._folder)], default=0)
            if logged > max(step, self._known["logged"]):
                self._known["logged"] = logged
                write_whole(self._folder / KNOWN, json.dumps(self._known) + "\n")
        for tracker in self._ours:
            tracker.rewind(step)
        for tell in self._others:
            tell("rewind", step)

    def file(self, path: Path) -> None:
        """Passes a file of the stage to the trackers."""
        for tracker in self._ours:
            tracker.file(path)
        for tell in self._others:
            tell("file", path)

    def close(self) -> None:
        """Closes every tracker; a second call does nothing more. Raises SaveError."""
        others, self._others = self._others, []
        for tell in others:
            tell("file", self._folder / FILE)
            tell.close()
        with ExitStack() as stack:  # closes all, whichever fails
            for tracker in self._ours:
                stack.callback(tracker.close)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
