"""What a tracker costs whose server accepts connections and never answers: python benchmarks/trackers.py wandb

Prints the seconds that writing and closing took, of a stage of SECONDS that writes once per second, and the seconds
that the process needs to end.
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

SECONDS = 60


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
    print(f"{tracking}: {cost:.3f} s of {SECONDS} s, {100 * cost / SECONDS:.2f} %", flush=True)
    print(f"ended {time.time()}", flush=True)


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "TRACKIO_SERVER_URL": address}
        command = [sys.executable, __file__, "--stage", f"jsonl,{sys.argv[1]}"]
        environment = os.environ | server | {"TRACKIO_WRITE_TOKEN": "0"}
        told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        line, ended = told.split("ended ")
        print(f"{line}the process ended {time.time() - float(ended):.1f} s later")


if __name__ == "__main__":
    stage(sys.argv[2]) if sys.argv[1] == "--stage" else main()
