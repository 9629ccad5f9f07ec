"""The processes of one run, called hosts: they start together, agree, exchange small values and end together.

Every host runs the same command and takes the same decisions from the same data. Only host 0 writes files other than
checkpoints. Hosts exchange small values over the coordination service of `jax.distributed`, which runs on host 0; only
`fetch` uses the devices. A host that fails tells the others, which end with its message and its exit code. If a host
dies silently, the watch of the others reports it after SILENCE_S, and JAX ends them after HEARTBEAT_S.

With one process every function still works and does nothing: `gather` returns a list of one value.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec

from reft_jax.parallel import host_log, private_jax
from reft_jax.store import settle, unforeseen
from reft_jax.types import InputError, NotFiniteError, SamplerGapError, SaveError, Stopped

CONNECT_S = 300  # for the slowest host to start
HEARTBEAT_S = 45  # from the death of a host until JAX ends the others
SILENCE_S = 20  # without a sign of life from a host, until the others report it
WATCH_S = 2  # between two checks of the other hosts
MOST_WAIT_S = 4 * 3600  # for one exchange; host 0 alone hashes a model on a share: 400 GB at 100 MB/s take 67 minutes
KEY = "reft_jax"


class Disagreement(InputError):
    """Hosts that should have the same values differ; the message names the host, the field and both values."""


class _State:
    """State of this process; `client` talks to the coordination service and is None for a single process."""

    def __init__(self):
        self.client, self.number, self.count, self.names = None, 0, 1, [""]
        self.exchanges = 0
        self.silent: dict[int, float] = {}  # host without a sign of life: seconds when it was noticed
        self.leaving: list[Callable[[], None]] = []
        self.ended = threading.Event()


_state = _State()


def number() -> int:
    """The number of this host, from 0. (`jax.process_index()` would initialize the devices.)"""
    return _state.number


def count() -> int:
    """The number of hosts."""
    return _state.count


def is_first() -> bool:
    """Whether this host writes reports, metrics and samples."""
    return _state.number == 0


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Makes this process one of the hosts inside the `with`; what ends one host ends all, with the same exit code.

    coordinator: host:port of host 0. num_processes: the number of hosts. process_id: of this one, from 0. Without
    them hosts find each other on a TPU pod and under Slurm's srun; elsewhere a process is alone.
    Enter it before JAX initializes its devices. Raises InputError if some arguments are missing or hosts do not come.
    """
    initialize(coordinator, num_processes, process_id)
    if count() == 1:
        yield
        return
    threading.Thread(target=_watch, name="reft-hosts", daemon=True).start()
    try:
        yield
        gather("the end of the run", None)
    except (SystemExit, Stopped):  # all hosts leave by the same decision
        raise
    except (InputError, NotFiniteError, SamplerGapError, SaveError) as error:
        _end_with(error)
    except KeyboardInterrupt:
        end_all(f"host {number()}: stopped by SIGINT", 128 + signal.SIGINT)
    except BaseException as error:
        if isinstance(error, OSError) and (told := unforeseen(error)):
            _end_with(told)
        traceback.print_exc()
        if _of_the_devices(error):  # perhaps the other side of a connection has died
            _look_for_the_lost()
        end_all(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", 1)
    finally:
        _state.ended.set()


def _end_with(error: Exception) -> None:
    end_all("error: " + " ".join(str(error).splitlines()), error.exit_code)


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects the hosts and learns their names: the first half of `joined`."""
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise InputError("--coordinator, --num_processes and --process_id: give all three, or none of them")
    if coordinator is None and not _cluster_is_known():
        return
    if coordinator is not None and not 0 <= process_id < num_processes:
        raise InputError(f"--process_id={process_id}: it must be from 0 to num_processes - 1 = {num_processes - 1}")
    try:
        jax.distributed.initialize(
            *given,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=CONNECT_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the hosts did not meet within {CONNECT_S} s ({error}); see what each one said") from error
    client, number_here, number_of_all = private_jax.coordination()
    if number_of_all > 1:
        _state.client, _state.number, _state.count = client, number_here, number_of_all
        _state.names = [str(i) for i in range(_state.count)]
        _state.names = gather("names", f"{_state.number} ({socket.gethostname()}, pid {os.getpid()})")
        _say(f"one of {_state.count}; host 0 is {_state.names[0]}")


def _cluster_is_known() -> bool:
    """Whether the machine itself says which hosts there are: a TPU pod, or several tasks of Slurm."""
    on_tpu = private_jax.on_tpu_vm() and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
    return on_tpu or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def log_to(folder: Path) -> None:
    """With several hosts, also writes all that this one prints from now on to folder/host_N.log.

    Standard error and host 0's standard output still go where they went before; the standard output of the other hosts
    goes only to the file.
    """
    if count() == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    last = f"host {number()}: JAX ended it: a host is lost. Above, task N is host N, and the leader {_state.names[0]}"
    for stream, file in ((1, sys.stdout), (2, sys.stderr)):
        file.flush()
        words, environment = host_log.copier(folder, number(), stream, last)
        copier = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL if stream == 1 and not is_first() else stream,
            start_new_session=True,  # signals to this process's group do not reach it
        )
        os.dup2(copier.stdin.fileno(), stream)
        copier.stdin.close()


def gather(what: str, value: Any) -> list[Any]:
    """Returns the `value` (JSON) of every host, in the order of the hosts, on every host.

    Every host must call it, and all in the same order of calls. what: the name of this exchange.
    Raises Disagreement if another host is at another exchange; TimeoutError if one does not come.
    """
    if count() == 1:
        return [value]
    settle()  # what this host appended to files, others may read afterwards
    client, mine = _state.client, json.dumps([what, value])
    _state.exchanges += 1
    key = f"{KEY}/{_state.exchanges}"
    if is_first():
        texts = [mine] + [_wait(f"{key}/{host}", host, what) for host in range(1, count())]
        client.key_value_set(f"{key}/all", json.dumps(texts))
        client.key_value_delete(f"{KEY}/{_state.exchanges - 1}")  # every host is here, so all have read it
    else:
        client.key_value_set(f"{key}/{number()}", mine)
        texts = json.loads(_wait(f"{key}/all", 0, what))
    said = [json.loads(text) for text in texts]
    for host, (place, _) in enumerate(said):
        if place != said[0][0]:
            raise Disagreement(f"host {_state.names[host]} is at {place!r}, host {_state.names[0]} at {said[0][0]!r}")
    return [value for _, value in said]


def from_first(what: str, make: Callable[[], Any]) -> Any:
    """Returns the value of `make()` on host 0 (JSON) on every host; the other hosts do not call `make`."""
    return gather(what, make() if is_first() else None)[0]


def agree(what: str, **fields: Any) -> None:
    """Raises Disagreement on every host unless all hosts give the same values (JSON) in the same fields."""
    said = gather(what, fields)
    for host, there in enumerate(said):
        for field in sorted(said[0].keys() | there.keys()):
            if there.get(field) != said[0].get(field):
                raise Disagreement(
                    f"{what}: {field} is {there.get(field)!r} on host {_state.names[host]} and {said[0].get(field)!r} "
                    f"on host {_state.names[0]}; start every host with the same command, code and files"
                )


_replicate = jax.jit(lambda tree: tree, out_shardings=PartitionSpec())


def fetch(tree):
    """Returns whole NumPy copies of the arrays of `tree`. Every host must call it, under the mesh of `on_mesh`."""
    if count() > 1 and not all(x.is_fully_replicated for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)):
        tree = _replicate(tree)
    return jax.device_get(tree)


def _wait(key: str, host: int, what: str) -> str:
    """Waits for the value at `key`, which `host` sets. Raises TimeoutError after MOST_WAIT_S."""
    begun = time.monotonic()
    while True:
        try:
            return _state.client.blocking_key_value_get(key, 30_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        waited = time.monotonic() - begun
        _say(f"has waited {waited:.0f} s for host {_state.names[host]} at {what!r}")
        if waited > MOST_WAIT_S:
            raise TimeoutError(f"host {_state.names[host]} did not come to {what!r} in {MOST_WAIT_S} s")


def _watch() -> None:
    """Gives signs of life and watches those of the others: reports silent hosts; ends this host if another failed."""
    place, beat, heard = f"{KEY}/watch", 0, {}
    while not _state.ended.wait(WATCH_S):
        beat += 1
        try:
            _state.client.key_value_set(f"{place}/{number()}", str(beat), allow_overwrite=True)
            found = {key.rpartition("/")[2]: text for key, text in _state.client.key_value_dir_get(place)}
        except jax.errors.JaxRuntimeError:
            if not _state.ended.is_set() and 0 not in _state.silent:
                _state.silent[0] = 0.0
                _say(f"host {_state.names[0]}, which connects all hosts, is gone: killed, or its machine is lost")
            continue
        if "failed" in found:
            host, code, line = json.loads(found["failed"])
            if host != number():
                _say(f"ends because host {_state.names[host]} has failed: {line}")
                _leave(code)
            return
        for host in range(count()):
            text, now = found.get(str(host)), time.monotonic()
            if host not in heard or heard[host][0] != text:
                heard[host] = text, now
                if _state.silent.pop(host, None):
                    _say(f"host {_state.names[host]} is back")
            elif now - heard[host][1] > SILENCE_S and host not in _state.silent:
                _state.silent[host] = now - heard[host][1]
                _say(f"no sign of life from host {_state.names[host]} for {SILENCE_S} s: was it killed or lost?")


def _of_the_devices(error: BaseException | None) -> bool:
    """Whether a failed computation is behind this error, directly or as a cause or context."""
    while error and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None


def _look_for_the_lost() -> None:
    """Gives the watch time to find out which host is missing; ends this host if one is."""
    _say("checks whether another host is lost")
    deadline = time.monotonic() + SILENCE_S + 5 * WATCH_S
    while time.monotonic() < deadline and not _state.silent:
        time.sleep(WATCH_S)
    for host in _state.silent:
        _say(f"ends because host {_state.names[host]} is lost: it was killed or its machine is gone")
        _leave(1)


def before_leaving(act: Callable[[], None]) -> None:
    """Registers `act` to be called when `end_all` or another host ends this process: no `finally` runs then."""
    _state.leaving.append(act)


def end_all(line: str, code: int) -> None:
    """Prints why this host ends, tells the others, which then end too, and ends it at once. Any thread may call it."""
    print(line, file=sys.stderr, flush=True)
    if _state.client:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host failed first, or host 0 is gone
            _state.client.key_value_set(f"{KEY}/watch/failed", json.dumps([number(), code, line]))
    _leave(code)


def _leave(code: int) -> None:
    """Ends this process at once, because an orderly end would wait for the others at a barrier.

    Host 0 runs the coordination service, so it first waits until every host that is alive has left.
    """
    for act in _state.leaving:
        act()
    if _state.client:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _state.client.key_value_set(f"{KEY}/gone/{number()}", "", allow_overwrite=True)
            deadline = time.monotonic() + 5 * WATCH_S
            while is_first() and time.monotonic() < deadline:
                if len(_state.client.key_value_dir_get(f"{KEY}/gone")) + len(_state.silent) >= count():
                    break
                time.sleep(0.2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(line: str) -> None:
    print(f"host {number()}: {line}", file=sys.stderr, flush=True)
