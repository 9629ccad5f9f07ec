"""Which files of the package does a question pass between its draw and its update?

    python benchmarks/trace.py [--all]

Runs a tiny quickstart (one SFT epoch, two iterations of PPO) in this process and traces the second iteration, whose
functions are compiled: from the draw of its questions to `Training.updated`. Prints the files in the order in which
they are first entered, without executor/, whose processes are separate. `--all` prints every stay: a file, then the
functions entered in it before another file is.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import app, flags

from reft_jax.config import check_config, load_config
from reft_jax.run.open import open_run
from reft_jax.stages.loop import Training
from reft_jax.stages.reft import run_reft
from reft_jax.stages.sft import run_sft

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(ROOT / "reft_jax") + os.sep
TINY = """
toy.train_rows=48 toy.dev_rows=6 toy.test_rows=7 toy.vocab_size=400 toy.layers=1 toy.hidden_size=16 toy.mlp_size=32
toy.heads=2 sft.epochs=1 sft.warmup_epoch=1 rl.iterations=2 rl.questions=16 rl.micro_batch=8 rl.minibatches=1
rl.max_prompt=192 rl.max_len=224 sft.max_len=224 sample.max_len=224 engine.slots=16 data.pad_multiple=224
""".split()
FLAGS = flags.FLAGS
flags.DEFINE_bool("all", False, "print every stay in a file")


class Tracer:
    """Records (file, function) for every call into the package, in the main thread."""

    def __init__(self):
        self.calls: list[tuple[str, str]] = []

    def __call__(self, frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE) and not name.startswith(PACKAGE + "executor"):
            self.calls.append((name.removeprefix(PACKAGE), frame.f_code.co_name))


def traced_iterations(tracer: Tracer):
    """`Training.iterations` that traces what is done with the second one."""
    iterations = Training.iterations

    def traced(self, *args, **kwargs):
        for iteration in iterations(self, *args, **kwargs):
            sys.setprofile(tracer if iteration.number == 2 else None)
            yield iteration

    return traced


def main(_: list[str]) -> None:
    tracer, updated = Tracer(), Training.updated

    def stop(self, *args, **kwargs):
        sys.setprofile(None)
        updated(self, *args, **kwargs)

    Training.iterations, Training.updated = traced_iterations(tracer), stop
    config = load_config(str(ROOT / "configs" / "quickstart.py"))
    config.update_from_flattened_dict(
        {key: type(config_value(config, key))(value) for key, _, value in (one.partition("=") for one in TINY)}
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        with open_run(check_config(config), Path(folder) / "run", []) as run:
            run_sft(run)
            run_reft(run)
    stays = [
        call for call, before in zip(tracer.calls, [("", ""), *tracer.calls], strict=False) if call[0] != before[0]
    ]
    if FLAGS.all:
        print("\n".join(f"{file}  {function}" for file, function in stays))
    files = list(dict.fromkeys(file for file, _ in tracer.calls))
    print("\n".join(files))
    print(f"{len(files)} files, {len(stays)} stays")


def config_value(config, key: str):
    section, field = key.split(".")
    return config[section][field]


if __name__ == "__main__":
    app.run(main)
