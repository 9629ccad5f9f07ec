"""What a tracker costs whose server accepts connections and never answers: python benchmarks/trackers.py wandb

Prints what a stage cost that writes once per second for SECONDS: opening, writing, closing, and the end of the process.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reft_jax.config import default_config
from reft_jax.train.trackers import MetricsWriter

SECONDS = 240


def stage(tracking: str) -> None:
    config = default_config()
    config.tracking = tracking
    began, cost = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        at = time.monotonic()
        writer = MetricsWriter(Path(folder) / "reft", config)
        cost += time.monotonic() - at
        for step in range(1, SECONDS + 1):
            time.sleep(max(0.0, began + step - time.monotonic()))
            at = time.monotonic()
            writer.write(step, {"reward": 0.5})
            cost += time.monotonic() - at
        at = time.monotonic()
        writer.close()
        cost += time.monotonic() - at
    print(cost, time.time(), flush=True)


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "TRACKIO_SERVER_URL": address}
        command = [sys.executable, __file__, "--stage", f"jsonl,{sys.argv[1]}"]
        environment = os.environ | server | {"TRACKIO_WRITE_TOKEN": "0"}
        told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        stage_cost, ended = map(float, told.split())
        end_cost = time.time() - ended
        share = (stage_cost + end_cost) / SECONDS
        print(f"{sys.argv[1]}: the stage {stage_cost:.3f} s, the end {end_cost:.1f} s of {SECONDS} s: {share:.2%}")


if __name__ == "__main__":
    stage(sys.argv[2]) if sys.argv[1] == "--stage" else main()
