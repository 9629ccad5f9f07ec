"""A work directory: may it be used with these settings, what it records of them, and what is removed from it."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from reft_jax import plugins
from reft_jax.config import flatten, to_json
from reft_jax.parallel import hosts
from reft_jax.run.about import versions
from reft_jax.store import write_whole, writing
from reft_jax.types import InputError

# What may change between two starts of one run: where it computes, not what.
MACHINE = ("compiled", "executor.workers", "keep_steps", "mesh.cpu_devices", "mesh.data", "mesh.fsdp", "mesh.tensor")
MACHINE += ("tracking", "watchdog_minutes")
FOLDERS = ("models", "samples", "sft", "reft", "compiled", "logs")
FILES = ("report.md", "report.json", "curves.png", "executions.jsonl.gz", "checksums.json", "versions.json")
FILES += ("sweep.md", "sweep.json", "sources.json")
PATHS = ("model.path", "data.train", "data.test", "data.dev")


def with_absolute_paths(config, workdir: Path):
    """The config with the absolute paths of its model and its files: what config.json records, wherever a start is.

    A relative path that leads nowhere from here is the one recorded in `workdir`, if that ends in it.
    """
    flat, before = flatten(config), recorded(workdir) or {}
    paths = {key: absolute(flat[key]) for key in PATHS}
    for key, path in paths.items():
        known, tail = str(before.get(key)), [part for part in Path(path).parts if part != ".."]
        if not os.path.exists(path) and os.path.isabs(known) and tail and list(Path(known).parts[-len(tail) :]) == tail:
            print(f"{key}: {path} is {known}, as before", flush=True)
            paths[key] = known
    changed = ConfigDict(config, type_safe=False)
    changed.update_from_flattened_dict(paths | {"task": plugins.absolute(flat["task"])})
    return FrozenConfigDict(changed)


def absolute(path: str) -> str:
    """A setting's path, absolute if there is something; "toy" and hub names stay."""
    named = path in ("", "toy") or path.startswith("hub:")
    return os.path.abspath(path) if not named and os.path.exists(path) else path


def recorded(workdir: Path) -> dict | None:
    """The settings that `workdir` was made with, None if it is new. InputError if they cannot be read."""
    path = workdir / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not the settings of a run ({error}); choose another --workdir") from error


def check_workdir(config, workdir: Path, needs: list[str], allowed: Sequence[str] = (), *, reads: bool = False) -> None:
    """Writes nothing. InputError unless `workdir` can be written and, where it was used before, was so with `config`.

    The settings of MACHINE and those named in `allowed` may differ. `needs` are the models that earlier stages must
    have made in it. A command that only `reads` need not be able to write.
    """
    if not reads:
        for folder in [workdir, *(path for path in workdir.glob("*") if path.is_dir())]:
            check_writable("--workdir", folder)
        check_kinds(workdir)
    before = recorded(workdir)
    if before is not None:
        before |= {key: absolute(before[key]) for key in PATHS if isinstance(before.get(key), str)}
        now = json.loads(to_json(config))
        changed = [key for key in before | now if before.get(key) != now.get(key) and key not in MACHINE]
        told = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        if refused := [key for key in changed if key not in allowed]:
            raise InputError(
                f"--workdir: {workdir} was made with other settings ({told}); choose another or, if what is done "
                f"there may stand beside them, add --allow_config_change={','.join(refused)}"
            )
        if changed:
            print(f"{workdir}: resumes with changed settings ({told})", flush=True)
    for name in needs:
        if not (workdir / "models" / name).exists():
            raise InputError(
                f"--workdir: {workdir} has no model {name!r}; run `pipeline`, or the command that makes it, there first"
            )


def check_kinds(workdir: Path) -> None:
    """InputError if what this program names in a work directory is no file, or no folder, that it can write."""
    files = [*(workdir / name for name in FILES), *workdir.glob("*/*.jsonl")]
    odd = [path for path in files if path.exists() and not (path.is_file() and os.access(path, os.W_OK))]
    odd += [folder for folder in (workdir / name for name in FOLDERS) if folder.exists() and not folder.is_dir()]
    if odd:
        kind = "folder" if odd[0].name in FOLDERS else "file"
        raise InputError(f"--workdir: {odd[0]} is no {kind} that can be written; move it away, or choose another")


def check_writable(flag: str, folder: Path) -> None:
    """Writes nothing. InputError unless `folder`, or what it would be made in, is a folder that can be written."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag}: cannot write to {folder} ({there} is no writable folder); choose another")


def create_workdir(config, workdir: Path) -> None:
    """Makes the work directory, if it is new, and records config and versions; a changed config takes its place.

    What finished stages left behind goes. One host does it; all must see it. Raises SaveError.
    """
    path, text = workdir / "config.json", to_json(config) + "\n"
    if hosts.is_first():
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        if not (path.exists() and path.read_text(encoding="utf-8") == text):
            write_whole(workdir / "versions.json", json.dumps(versions(), indent=1) + "\n")
            write_whole(path, text)  # last: from here on the directory is in use
        for done in workdir.glob("*/done.json"):
            remove_leftovers(done.parent)
    hosts.gather("the work directory", None)
    if not path.exists():
        raise InputError(f"--workdir: {workdir} of host 0 is not there on host {hosts.number()}; choose a shared one")


def remove_leftovers(stage: Path) -> None:
    """What a finished stage no longer needs: its saved steps and its best models, each as large as a model or three."""
    for folder in (stage / "checkpoints", *stage.glob("best_*")):
        shutil.rmtree(folder, ignore_errors=True)
