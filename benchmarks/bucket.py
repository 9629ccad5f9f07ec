"""What does a work directory in a bucket cost? The same command on a disk and on an emulator of the store, in turns.

    python benchmarks/bucket.py [--rounds=3] [--emulator=URL] COMMAND --config=… …

Prints the wall times of each pair, the ratio of their medians, and the machine. Without --emulator it starts
fake-gcs-server on loopback, as the tests do. The command must not name a --workdir. Both sides compile into one folder,
which a first run fills, so that compiling is in neither.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from emulator import BUCKET, emulator, environment
from machine import head

ROOT = Path(__file__).resolve().parents[1]


def seconds(words: list[str], workdir: str, compiled: Path, url: str) -> float:
    """Wall time of one run in a new work directory."""
    command = [sys.executable, "-m", "reft_jax", *words, f"--workdir={workdir}", f"--config.compiled={compiled}"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment(url), stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--emulator", default="")
    asked, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with nullcontext(asked.emulator) if asked.emulator else emulator(folder) as url:
            seconds(words, str(folder / "first"), folder / "compiled", url)
            times = {"disk": [], "bucket": []}
            for number in range(asked.rounds):
                for kind in list(times)[:: 1 if number % 2 else -1]:  # first one, then the other begins
                    place = f"{BUCKET}/{os.getpid()}" if kind == "bucket" else str(folder)
                    times[kind].append(seconds(words, f"{place}/run{number}", folder / "compiled", url))
                print(" ".join(f"{kind} {took[-1]:.1f} s" for kind, took in times.items()), flush=True)
    disk, bucket = (statistics.median(took) for took in times.values())
    print(f"bucket / disk: {bucket / disk:.3f}\n{head()}")


if __name__ == "__main__":
    main()
