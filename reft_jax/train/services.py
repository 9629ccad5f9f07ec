"""The trackers `wandb` and `trackio`: an extra each, imported in a process of its own when a stage opens them.

Both read their own environment variables: WANDB_MODE=offline, WANDB_PROJECT, TRACKIO_DIR, TRACKIO_SERVER_URL, …
"""

import os
import re
from pathlib import Path
from typing import Any

PROJECT = "reft_jax"


def plain(name: str) -> str:
    """The last 64 characters, and "_" for those that neither service allows; a folder may have them."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", name)[-64:]


class Wandb:
    """The tracker `wandb`: a run of Weights & Biases with our run id, so that a later start continues it.

    Offline (WANDB_MODE=offline) each start makes a folder `offline-run-…` with this id in `wandb/` of the stage's
    folder. `wandb sync` joins them.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def open(self, run_id: str, config: dict[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=plain(run_id),
            name=run_id,
            config=config,
            dir=self._folder,
            resume="allow",
            reinit="create_new",
            settings=quiet,
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def file(self, path: Path) -> None:
        self._run.save(path, base_path=path.parent, policy="now")

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """The tracker `trackio`: a run named by our run id, in TRACKIO_DIR, or on the server or Space of its variables."""

    def __init__(self, folder: Path):
        pass

    def open(self, run_id: str, config: dict[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run_id,
            config=config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def file(self, path: Path) -> None:
        self._run.log_artifact(path, name=plain(f"{self._run.name}-{path.name}"), type="file")

    def close(self) -> None:
        self._run.finish()


SERVICES = {"wandb": Wandb, "trackio": Trackio}
SYNC = {  # what sends the rest later, after a run that did not wait for it; {} is the stage's folder
    "wandb": "wandb sync {}/wandb/*run-*",
    "trackio": "trackio sends what it kept when the run starts again",
}
