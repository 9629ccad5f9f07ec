"""A work directory: whether these settings may use it, what it records of them, and what is removed from it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from reft_jax import plugins
from reft_jax.config import flatten, renamed, replaced, to_json
from reft_jax.parallel import hosts
from reft_jax.run.about import versions
from reft_jax.settings import SETTINGS, Config
from reft_jax.store import may_write, published, reading, remove, why_not_writable, write_whole, writing
from reft_jax.types import InputError

# Settings that may change between two starts of one run: they decide where it computes, not what.
MACHINE = ("compiled", "executor.workers", "keep_steps", "mesh.cpu_devices", "mesh.data", "mesh.fsdp", "mesh.tensor")
MACHINE += ("reward_timeout_s", "reward_workers", "tracking", "watchdog_minutes")
TITLES = {
    "warmup": "SFT warm-up",
    "sft": "SFT",
    "self_train_offline": "offline self-training",
    "self_train_online": "online self-training",
    "reft": "ReFT",
}
POLICIES = tuple(TITLES)
STAGES = (*(name for name in POLICIES if name != "warmup"), *(f"rerank_{name}" for name in POLICIES))
FOLDERS = ("models", "samples", "sft", "reft", "compiled", "logs")
FILES = ("report.md", "report.json", "report.html", "curves.png", "executions.jsonl.gz", "checksums.json")
FILES += ("versions.json", "sweep.md", "sweep.json", "sources.json")
PATHS = ("model.path", "data.train", "data.test", "data.dev")
PLUGINS = ("task", "reward", "model.family", "rl.algorithm")  # settings that may name a file of one's own, path.py:NAME


def with_absolute_paths(config, workdir: Path) -> Config:
    """The config with absolute paths of its model and its files, as config.json records them.

    A relative path under which nothing exists here is replaced by the one recorded in `workdir`, if that ends in it:
    a run may be resumed from another folder.
    """
    flat, before = flatten(config), recorded(workdir) or {}
    paths = {key: absolute(flat[key]) for key in PATHS}
    for key, path in paths.items():
        known, tail = str(before.get(key)), [part for part in Path(path).parts if part != ".."]
        if not os.path.exists(path) and os.path.isabs(known) and tail and list(Path(known).parts[-len(tail) :]) == tail:
            print(f"{key}: {path} is {known}, as before", flush=True)
            paths[key] = known
    paths |= {key: plugins.absolute(flat[key]) for key in PLUGINS}
    return replaced(config, paths)


def absolute(path: str) -> str:
    """A setting's path, absolute if it exists; "toy" and hub names stay as they are."""
    named = path in ("", "toy") or path.startswith("hub:")
    return os.path.abspath(path) if not named and os.path.exists(path) else path


def recorded(workdir: Path) -> dict | None:
    """The settings that `workdir` was made with, old names replaced; None if it is new. InputError if unreadable."""
    path = workdir / "config.json"
    try:
        with reading(path):
            settings = dict(json.loads(path.read_text(encoding="utf-8")))
        return {renamed(str(key)) or key: value for key, value in settings.items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not the settings of a run ({error}); choose another --workdir") from error


def check_workdir(
    config, workdir: Path, needs: list[str], allowed: Sequence[str] = (), *, read_only: bool = False
) -> None:
    """Writes nothing. InputError unless `workdir` can be written and is new or was made with the settings of `config`.

    allowed: settings that may differ, besides those of MACHINE. needs: models that earlier stages must have made in it.
    read_only: the command writes nothing in it.
    """
    if not read_only:
        for folder in [workdir, *(path for path in workdir.glob("*") if path.is_dir())]:
            check_writable("--workdir", folder)
        check_kinds(workdir)
    before = recorded(workdir)
    if before is not None:
        before |= {key: absolute(before[key]) for key in PATHS if isinstance(before.get(key), str)}
        # A setting that is newer than the directory is not in it; the run did what the default means.
        before = {key: setting.default for key, setting in SETTINGS.items()} | before
        now = json.loads(to_json(config))
        changed = [key for key in before | now if before.get(key) != now.get(key) and key not in MACHINE]
        told = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        if refused := [key for key in changed if key not in allowed]:
            remedy = f"choose another or, to continue with the new ones, add --allow_config_change={','.join(refused)}"
            raise InputError(f"--workdir: {workdir} was made with other settings ({told}); {remedy}")
        if changed:
            print(f"{workdir}: resumes with changed settings ({told})", flush=True)
    for name in needs:
        if not published(workdir / "models" / name):
            remedy = "run `pipeline`, or the command that makes it, there first"
            raise InputError(f"--workdir: {workdir} has no model {name!r}; {remedy}")


def check_kinds(workdir: Path) -> None:
    """InputError if a file or folder that a run will write is there as something else, or cannot be written."""
    files = [*(workdir / name for name in FILES), *workdir.glob("*/*.jsonl")]
    odd = [path for path in files if path.exists() and not (path.is_file() and may_write(path))]
    odd += [folder for folder in (workdir / name for name in FOLDERS) if folder.exists() and not folder.is_dir()]
    if odd:
        kind = "folder" if odd[0].name in FOLDERS else "file"
        raise InputError(f"--workdir: {odd[0]} is not a {kind} that can be written; move it away, or choose another")


def check_writable(flag: str, folder: Path) -> None:
    """Writes nothing. InputError unless `folder`, or the first folder above it that exists, can be written."""
    if why := why_not_writable(folder):
        raise InputError(f"{flag}: cannot write to {folder} ({why}); choose another")


def create_workdir(config, workdir: Path) -> None:
    """Makes the work directory if it is new. Records config and versions there; a changed config replaces the old one.

    Removes what finished stages no longer need, but nothing from a folder that is new to runs: that is another's. The
    first host does it; all must see it. Raises SaveError.
    """
    path, text = workdir / "config.json", to_json(config) + "\n"
    if hosts.is_first():
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        known = path.exists()
        if not (known and path.read_text(encoding="utf-8") == text):
            write_whole(workdir / "versions.json", json.dumps(versions(), indent=1) + "\n")
            write_whole(path, text)  # last: from here on the directory is in use
        for stage in (workdir / name for name in STAGES):
            if known and (stage / "done.json").exists():
                remove_leftovers(stage)
    hosts.gather("the work directory", None)
    if not path.exists():
        raise InputError(f"--workdir: host {hosts.number()} does not see {workdir} of host 0; choose a shared folder")


def remove_leftovers(stage: Path) -> None:
    """Removes the saved steps and the best models of a finished stage: each is as large as one to three models."""
    for folder in (stage / "checkpoints", *stage.glob("best_*")):
        remove(folder)
