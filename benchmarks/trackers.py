"""What a tracker costs whose server accepts connections and never answers: python benchmarks/trackers.py wandb

Prints the seconds of a stage that writes once per second for SECONDS, beside those of the same stage with jsonl alone,
and the seconds that the end of the process takes.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reft_jax.config import default_config
from reft_jax.train.trackers import MetricsWriter, deliver

SECONDS = 240


def stage(folder: Path, name: str) -> None:
    """Writes two stages, step by step in turn; prints what each cost, and the end."""
    began, costs, writers = time.monotonic(), {}, {}
    for tracking in ("jsonl", f"jsonl,{name}"):
        config = default_config()
        config.tracking = tracking
        at = time.monotonic()
        writers[tracking] = MetricsWriter(folder / tracking, config)
        costs[tracking] = time.monotonic() - at
    for step in range(1, SECONDS + 1):
        time.sleep(max(0.0, began + step - time.monotonic()))
        for tracking, writer in writers.items():
            at = time.monotonic()
            writer.write(step, {"reward": 0.5})
            costs[tracking] += time.monotonic() - at
    for tracking, writer in writers.items():
        at = time.monotonic()
        writer.close()
        costs[tracking] += time.monotonic() - at
    at = time.monotonic()
    deliver()  # what the end of the process does
    print(*costs.values(), time.monotonic() - at)


def main(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent, tempfile.TemporaryDirectory() as folder:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "TRACKIO_SERVER_URL": address}
        environment = os.environ | server | {"TRACKIO_WRITE_TOKEN": "0"}
        command = [sys.executable, __file__, folder, name]
        told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        alone, cost, end = map(float, told.split())
        share = (cost - alone + end) / SECONDS
        print(
            f"{name}: stage {cost:.3f} s, with jsonl alone {alone:.3f} s, end {end:.1f} s, in {SECONDS} s: {share:.2%}"
        )


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else stage(Path(sys.argv[1]), sys.argv[2])
