"""Where the numbers of a stage go: trackers, chosen by the setting `tracking`.

`tracking` is a list with commas between: names of TRACKERS, and `path.py:NAME` for a Tracker of a user's own. `jsonl`
is always needed: a stage that resumes reads it. With several hosts only the first one has trackers.
"""

import json
import secrets
import socket
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
from reft_jax.store import local, publish, write_whole, writing
from reft_jax.train.metrics import FILE, JsonLines, read_metrics
from reft_jax.train.progress import remark
from reft_jax.types import InputError

KNOWN = "tracking.json"
DEFAULT = "jsonl,tensorboard"
METHODS = ("open", "log", "file", "close")


class Tracker(Protocol):
    """Takes the numbers of one stage. It is made with the stage's folder, `NAME(folder)`, before anything is logged.

    A user's own tracker cannot end a run: its first exception becomes one warning, and it is switched off.

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
        # Nanoseconds: otherwise a quick restart would overwrite the previous file.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        with writing(self._folder):
            self._local.mkdir(parents=True, exist_ok=True)
            self._path = self._local / name
            self._file, self._flushed = RecordWriter(str(self._path)), time.monotonic()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._purge_step is not None:
            self._write(Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        with writing(self._folder):
            self._file.write(event.SerializeToString())


TRACKERS = {"tensorboard": TensorBoard, "jsonl": JsonLines}


def load_trackers(setting: str) -> dict[str, Callable[[Path], Tracker]]:
    """By name, what makes each tracker of the setting `tracking`. InputError if one is unknown or incomplete."""
    found = {}
    for name in map(str.strip, setting.split(",")):
        if name in TRACKERS:
            found[name] = TRACKERS[name]
            continue
        if not plugins.is_plugin(name):
            raise InputError(
                f"tracking={setting!r}: {name!r} is not known; did you mean {nearest(name, TRACKERS)!r}? Known are "
                f"{', '.join(TRACKERS)}, and {plugins.FORM} of a file of your own"
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
    """A tracker of a user's own: its first exception becomes one warning, and it is switched off."""

    def __init__(self, name: str, make: Callable[[Path], Tracker], folder: Path):
        self._name, self._made = name, None
        self._try(lambda: setattr(self, "_made", make(folder)))
        self.rewinds = hasattr(self._made, "rewind")

    def __call__(self, method: str, *args) -> None:
        if self._made is not None:
            self._try(lambda: getattr(self._made, method)(*args))

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a user's code raises
            self._made = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            remark(f"warning: tracker {self._name} is switched off, the run continues without it ({reason})")


class MetricsWriter:
    """The trackers of one stage. A context.

        with MetricsWriter(workdir / "reft", config) as metrics:
            metrics.truncate_after(restored_step)  # when resuming
            metrics.write(step, {"reward": reward, "kl": kl})

    `tracking.json` in the stage's folder keeps the run id, and the highest step that was logged before a resume.
    """

    def __init__(self, folder: Path, config=None):
        """Opens the trackers of `config.tracking`; without a config, DEFAULT. Raises InputError, SaveError."""
        flat = {} if config is None else flatten(config)
        makers = load_trackers(flat.get("tracking", DEFAULT))
        self._folder, self._ours, self._others = folder, [], []
        if not is_first():
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._known = self._read_known()
        # Ours come first: then metrics.jsonl has every step that a user's own tracker was given, also after a kill.
        self._ours = [TRACKERS[name](folder) for name in TRACKERS if name in makers]
        self._others = [Guarded(name, make, folder) for name, make in makers.items() if name not in TRACKERS]
        for tracker in self._ours:
            tracker.open(self._known["run_id"], flat)
        for tell in self._others:
            tell("open", self._known["run_id"], dict(flat))

    def _read_known(self) -> dict:
        path = self._folder / KNOWN
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            return {"run_id": str(known["run_id"]), "logged": int(known["logged"])}
        except FileNotFoundError:
            known = {"run_id": f"{self._folder.parent.name}-{self._folder.name}-{secrets.token_hex(4)}", "logged": 0}
            write_whole(path, json.dumps(known) + "\n")
            return known
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: cannot be read ({error!r}); restore it from a copy or remove it") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values (anything that `float` takes) of one step. Raises SaveError."""
        step, numbers = int(step), {name: float(value) for name, value in values.items()}
        for tracker in self._ours:
            tracker.log(step, numbers)
        for tell in self._others:
            if tell.rewinds or step > self._known["logged"]:
                tell("log", step, dict(numbers))

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
            if tell.rewinds:
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
            tell("close")
        with ExitStack() as stack:  # closes all, whichever fails
            for tracker in self._ours:
                stack.callback(tracker.close)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
