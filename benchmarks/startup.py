"""What takes a command's time from its start to its first update, with every compiled function in the cache?

    python benchmarks/startup.py [--stages=sft,reft] [--times=5] [--before=CHECKOUT]

Starts the stage on the embedded default, each time in a new work directory, with one folder of compiled functions per
checkout. The first start fills that folder and does not count. For `reft` the new work directory holds the warm-up
model of one short SFT. Counts the seconds of processor time (user + system, all threads) of the command's own process,
which other jobs disturb less than wall time; the executor's processes are left out. `--before` names another checkout,
whose starts take turns with ours. Each figure is a median. Rewrites the table in benchmarks/README.md.
"""

import builtins
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from absl import app, flags
from machine import report

FLAGS = flags.FLAGS
flags.DEFINE_list("stages", ["sft", "reft"], "commands that are started")
flags.DEFINE_integer("times", 5, "starts of each that count", lower_bound=1)
flags.DEFINE_string("before", "", "another checkout, to compare with")
flags.DEFINE_bool("write", True, "rewrite the table in benchmarks/README.md")

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    f"--config={ROOT / 'configs' / 'quickstart.py'}",
    *(f"--config.sft.{one}" for one in ("epochs=1", "warmup_epoch=1", "eval_every=1")),
]
# Functions whose time is a part of its own. The order is that of replacing them: each before a module takes its name.
PARTS = {
    "loading the tokenizer": ("tasks.tokenizer:load_tokenizer",),
    "toy: its data, tokenizer and weights": ("toy.model:write_data", "toy.model:write_model"),
    "executor and devices": ("executor:start", "run.machine:make_mesh"),
    "tokenizing and checking the rows": ("run.inputs:read_inputs",),
    "rollout": ("stages.rollout:roll_out_once",),
    "evaluation of the start model": ("stages.loop:Training.dev_top1",),
    "state of the training": ("stages.loop:Training.__init__",),
}
IMPORTS, REST, ALL = "imports", "the rest, with the update", "all"
COUNTS = COMPILED, READ = "functions compiled", "functions read from the cache"


class Parts:
    """Seconds of processor time by part. A part inside another one counts for itself alone."""

    def __init__(self):
        self.seconds, self.inside, self.since = dict.fromkeys([IMPORTS, *PARTS, REST], 0.0), [REST], 0.0

    def settle(self) -> None:
        now = time.process_time()
        self.seconds[self.inside[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, function):
        """`function`, whose time counts for `part`."""

        def call(*args, **kwargs):
            if part == self.inside[-1]:
                return function(*args, **kwargs)
            self.settle()
            self.inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.settle()
                self.inside.pop()

        return call


def start(argv: list[str]) -> None:
    """Runs a command in this process until its first update, prints its parts as JSON, and ends the process."""
    parts, counts = Parts(), Counter()
    builtins.__import__ = parts.timed(IMPORTS, builtins.__import__)
    from reft_jax import __main__ as command

    def count(event: str, *_, **__) -> None:
        counts[event] += 1

    def updated(training, state, *_, **__) -> None:
        import jax

        jax.block_until_ready(state)
        parts.settle()
        read = counts["/jax/compilation_cache/cache_hits"]
        compiled = counts["/jax/core/compile/backend_compile_duration"] - read
        print(json.dumps(parts.seconds | {ALL: time.process_time(), COMPILED: compiled, READ: read}), flush=True)
        os._exit(0)

    def run_row(*args):  # `main` has set by now what must be set before the first import of JAX
        import jax

        jax.monitoring.register_event_listener(count)
        jax.monitoring.register_event_duration_secs_listener(count)
        for part, names in PARTS.items():
            for name in names:
                replace(name, partial(parts.timed, part))
        replace("stages.loop:Training.updated", lambda _: updated)
        return row(*args)

    row, command.run_row, sys.argv = command.run_row, run_row, ["reft", *argv]
    command.main()


def replace(name: str, make) -> None:
    """Replaces a function of the package, "module:name", by what `make` makes of it."""
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    owner = importlib.import_module(f"reft_jax.{module}")
    for one in owners:
        owner = getattr(owner, one)
    setattr(owner, last, make(getattr(owner, last)))


def measured(checkout: Path, stage: str, workdir: Path, compiled: Path) -> dict[str, float]:
    """The parts of one start of a stage with the code of `checkout`."""
    words = [sys.executable, __file__, stage, *SETTINGS, f"--workdir={workdir}", f"--config.compiled={compiled}"]
    done = subprocess.run(words, env=environment(checkout, START="1"), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def environment(checkout: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"PYTHONPATH": str(checkout)} | more


def main(_: list[str]) -> None:
    checkouts = {"before": Path(FLAGS.before).resolve()} if FLAGS.before else {}
    checkouts["now"] = ROOT
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "reft" in FLAGS.stages:
            words = [sys.executable, "-m", "reft_jax", "sft", *SETTINGS, f"--workdir={scratch / 'warm'}"]
            subprocess.run(words, env=environment(ROOT), stdout=subprocess.DEVNULL, check=True)
        for time_ in range(FLAGS.times + 1):
            for stage, (name, checkout) in itertools.product(FLAGS.stages, checkouts.items()):
                workdir = scratch / "run"
                if stage == "reft":
                    shutil.copytree(scratch / "warm", workdir, ignore=shutil.ignore_patterns("compiled"))
                parts = measured(checkout, stage, workdir, scratch / f"compiled_{name}")
                shutil.rmtree(workdir)
                if time_:
                    found.setdefault((stage, name), []).append(parts)
    lines = ["| seconds of processor time | " + " | ".join(" ".join(column) for column in found) + " |"]
    lines.append("| --- " * (len(found) + 1) + "|")
    for part in (IMPORTS, *PARTS, REST, ALL, COMPILED, READ):
        figures = [statistics.median(one[part] for one in starts) for starts in found.values()]
        if any(figures):
            lines.append(f"| {part} | {' | '.join(f'{x:.0f}' if part in COUNTS else f'{x:.2f}' for x in figures)} |")
    print("\n".join(lines))
    report("startup", "", lines, FLAGS.write)


if __name__ == "__main__":
    if os.environ.get("START"):
        start(sys.argv[1:])
    app.run(main)
