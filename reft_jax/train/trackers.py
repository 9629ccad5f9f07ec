"""Where the numbers of a stage go: trackers, chosen by the setting `tracking`.

`tracking` is a list with commas between: names of TRACKERS, and `path.py:NAME` for a Tracker of a user's own. `jsonl`
is always needed: a stage that resumes reads it. With several hosts only the first one has trackers.
"""

import importlib.util
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from reft_jax import plugins
from reft_jax.config import flatten, nearest
from reft_jax.parallel.hosts import is_first
from reft_jax.store import write_whole, writing
from reft_jax.train.metrics import FILE, JsonLines, read_metrics
from reft_jax.train.progress import remark
from reft_jax.train.services import SERVICES
from reft_jax.types import InputError

KNOWN = "tracking.json"
DEFAULT = "jsonl,tensorboard"
METHODS = ("open", "log", "file", "close")


class Tracker(Protocol):
    """Takes the numbers of one stage. It is made with the stage's folder, `NAME(folder)`, before anything is logged.

    A tracker other than jsonl and tensorboard cannot end or slow a run (see Guarded). A thread calls its methods.

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
        self._file: RecordWriter | None = None  # made by the first `log`, because `rewind` may be called before
        self._purge_step: int | None = None

    def open(self, run_id: str, config: dict[str, Any]) -> None:
        pass

    def rewind(self, step: int) -> None:
        """TensorBoard will hide the later events of older files."""
        self._purge_step = step + 1

    def log(self, step: int, numbers: dict[str, float]) -> None:
        if self._file is None:
            self._begin()
        points = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(Event(step=step, wall_time=time.time(), summary=Summary(value=points)))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            with writing(self._folder):
                self._file.flush()
            self._flushed = time.monotonic()

    def file(self, path: Path) -> None:
        pass

    def close(self) -> None:
        if self._file is not None:
            with writing(self._folder):
                self._file.close()

    def _begin(self) -> None:
        # Nanoseconds: otherwise a quick restart would overwrite the previous file.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file, self._flushed = RecordWriter(str(self._folder / name)), time.monotonic()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._purge_step is not None:
            self._write(Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        with writing(self._folder):
            self._file.write(event.SerializeToString())


TRACKERS = {"tensorboard": TensorBoard, "jsonl": JsonLines}


def load_trackers(setting: str) -> dict[str, Callable[[Path], Tracker]]:
    """By name, what makes each tracker of the setting `tracking`. InputError if one is unknown or incomplete."""
    found, known = {}, [*TRACKERS, *SERVICES]
    for name in map(str.strip, setting.split(",")):
        if name in TRACKERS:
            found[name] = TRACKERS[name]
            continue
        if name in SERVICES:
            if importlib.util.find_spec(name) is None:
                raise InputError(
                    f"tracking={setting!r}: {name} is not installed; install reft_jax[{name}], or leave {name} out"
                )
            found[name] = SERVICES[name]
            continue
        if not plugins.is_plugin(name):
            raise InputError(
                f"tracking={setting!r}: {name!r} is not known; did you mean {nearest(name, known)!r}? Known are "
                f"{', '.join(known)}, and {plugins.FORM} of a file of your own"
            )
        found[name] = plugins.load(name, "tracking")
        absent = [method for method in METHODS if isinstance(found[name], type) and not hasattr(found[name], method)]
        if absent or not callable(found[name]):
            what = f"has no method {', '.join(absent)}" if absent else "is not a class"
            raise InputError(f"tracking={setting!r}: {name} {what}; see Tracker in reft_jax/train/trackers.py")
    if "jsonl" not in found:
        raise InputError(f"tracking={setting!r}: jsonl is missing, and a run resumes from it; write jsonl,{setting}")
    return found


class Guarded:
    """A tracker that cannot stop or slow a run: a thread of its own makes it and calls it, in order.

    Its first exception becomes one warning, and it is switched off. So does a call that takes longer than
    CALL_SECONDS: the thread is left alone, as nothing can end it, and its queue takes nothing more.
    """

    CALL_SECONDS = 30.0
    CLOSE_SECONDS, CLOSE_SHARE = 10.0, 0.005  # the wait at the end: seconds, or a share of the stage's time if longer

    def __init__(self, name: str, make: Callable[[Path], Tracker], folder: Path):
        self._name, self._make, self._folder = name, make, folder
        self._began = self._called = time.monotonic()
        self._on, self._queue = True, queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def __call__(self, method: str, *args, again: bool = False) -> None:
        """Queues one call and returns at once. again: a step logged before a resume, for trackers that can rewind."""
        if self._on and (called := self._called) and time.monotonic() - called > self.CALL_SECONDS:
            self._switch_off(f"a call took longer than {self.CALL_SECONDS:g} s")
        if self._on:
            self._queue.put((method, args, again))

    def close(self) -> None:
        """Closes it, and waits a while for what is in the queue."""
        self("close")
        self._queue.put(None)
        if self._on:
            seconds = max(self.CLOSE_SECONDS, self.CLOSE_SHARE * (time.monotonic() - self._began))
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._switch_off(f"it was not closed within {seconds:.0f} s")

    def _work(self) -> None:
        try:
            tracker = self._make(self._folder)
            self._called = 0.0
            while (one := self._queue.get()) and self._on:
                method, args, again = one
                if (again or method == "rewind") and not hasattr(tracker, "rewind"):
                    continue
                self._called = time.monotonic()
                getattr(tracker, method)(*args)
                self._called = 0.0
        except Exception as error:  # whatever a tracker raises
            self._switch_off(" ".join(f"{type(error).__name__}: {error}".split()))

    def _switch_off(self, reason: str) -> None:
        if self._on:
            self._on = False
            remark(f"warning: tracker {self._name} is switched off, the run continues without it ({reason})")


def share(folder: Path, config, versions: dict[str, str], paths: list[Path]) -> None:
    """Passes the results of a work directory to the trackers outside it, as a run of their own. Raises InputError."""
    makers = {name: make for name, make in load_trackers(config.tracking).items() if name not in TRACKERS}
    if not makers or not is_first():
        return
    run_id, flat = _read_known(folder)["run_id"], _described(config, versions)
    for tell in [Guarded(name, make, folder) for name, make in makers.items()]:
        tell("open", run_id, dict(flat))
        for path in paths:
            tell("file", path)
        tell.close()


def _described(config, versions: dict[str, str]) -> dict[str, Any]:
    return flatten(config) | {f"versions.{name}": version for name, version in versions.items()}


def _read_known(folder: Path) -> dict:
    path = folder / KNOWN
    try:
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
        self._others = [Guarded(name, make, folder) for name, make in makers.items() if name not in TRACKERS]
        for tracker in self._ours:
            tracker.open(self._known["run_id"], flat)
        for tell in self._others:
            tell("open", self._known["run_id"], dict(flat))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values (anything that `float` takes) of one step. Raises SaveError."""
        step, numbers = int(step), {name: float(value) for name, value in values.items()}
        for tracker in self._ours:
            tracker.log(step, numbers)
        for tell in self._others:
            tell("log", step, dict(numbers), again=step <= self._known["logged"])

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
