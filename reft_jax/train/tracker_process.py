"""The process of one tracker: its library cannot hold up a run there, and its exit hooks do not run. Imports no JAX.

    python -m reft_jax.train.tracker_process NAME FOLDER

NAME is one of SERVICES or path.py:NAME. It reads calls from standard input and writes a reply to each, a line of JSON
each: [method, arguments, again] and what went wrong, "" if nothing did. What the library prints goes to standard error.
It ends with its input, and with its parent.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from reft_jax import plugins
from reft_jax.tasks.reward_worker import end_with_parent, own_streams, reply
from reft_jax.train.services import SERVICES

MAKE = "make"  # the first call; the others are those of Tracker


def main(name: str, folder: str) -> None:
    """Answers every call until the input ends."""
    end_with_parent()
    calls, replies = own_streams()
    tracker = None
    for line in calls:
        method, arguments, again = json.loads(line)
        try:
            if method == MAKE:
                tracker = (SERVICES.get(name) or plugins.load(name, "tracking"))(Path(folder))
            elif hasattr(tracker, "rewind") or not (again or method == "rewind"):
                getattr(tracker, method)(*map(Path, arguments) if method == "file" else arguments)
            failed = ""
        except BaseException as error:  # whatever a tracker raises, also SystemExit
            traceback.print_exc()
            failed = " ".join(f"{type(error).__name__}: {error}".split())
        reply(replies, failed)
    os._exit(0)  # without the exit hooks of its library, which may wait


if __name__ == "__main__":
    main(*sys.argv[1:])
