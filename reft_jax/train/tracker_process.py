"""The process of one tracker: its library cannot hold up a run there, and its exit hooks do not run. Imports no JAX.

    python -m reft_jax.train.tracker_process NAME FOLDER

NAME is one of SERVICES or path.py:NAME. It reads calls from standard input and writes a reply to each, a line of JSON
each: [method, arguments, again] and what went wrong, "" if nothing did. What the library prints goes to standard error.
It ends with its input. If the run was killed, it closes the tracker first: wandb writes its file then.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from reft_jax import plugins
from reft_jax.tasks.reward_worker import own_streams, reply
from reft_jax.train.services import SERVICES

MAKE = "make"  # the first call; the others are those of Tracker
LAST_SECONDS = 30  # after the end of its input


def main(name: str, folder: str) -> None:
    """Answers every call until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the run, which then closes the tracker
    calls, replies = own_streams()
    tracker, closed = None, False
    for line in calls:
        method, arguments, again = json.loads(line)
        try:
            if method == MAKE:
                tracker = (SERVICES.get(name) or plugins.load(name, "tracking"))(Path(folder))
            elif hasattr(tracker, "rewind") or not (again or method == "rewind"):
                getattr(tracker, method)(*map(Path, arguments) if method == "file" else arguments)
            failed, closed = "", method == "close"
        except BaseException as error:  # whatever a tracker raises, also SystemExit
            traceback.print_exc()
            failed = " ".join(f"{type(error).__name__}: {error}".split())
        reply(replies, failed)
    signal.alarm(LAST_SECONDS)  # ends it, whatever it does: the run may be gone
    if tracker and not closed:
        tracker.close()
    os._exit(0)  # without the exit hooks of its library, which may wait


if __name__ == "__main__":
    main(*sys.argv[1:])
