"""The small files of a model folder: the tokenizer's, and the ids that end a text. And: can a new folder be made?

No JAX: mistakes in these files should show in a second, before anything starts.
"""

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reft_jax.types import InputError

CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)
LFS_POINTER = b"version https://git-lfs"
SCRATCH = ".reft_jax."  # how the name of a folder begins that is not whole yet


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object of a settings file, {} if there is none. InputError if it is anything else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); see to its permissions") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy the file again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON object is needed, this is a {type(raw).__name__}; copy the file again")
    return raw


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The folder's tokenizer files by name. InputError for one that is a dangling link or cannot be read."""
    try:
        names = {name for pattern in TOKENIZER_FILES for name in fnmatch.filter(os.listdir(folder), pattern)}
        for path in (folder / name for name in sorted(names)):
            if not path.exists():
                raise InputError(f"{path}: a link to {os.readlink(path)}, which is not there; copy the file itself")
            if path.is_file():
                with path.open("rb") as file:
                    if file.read(len(LFS_POINTER)) == LFS_POINTER:
                        raise InputError(f"{path}: a git-lfs pointer, not the file; run `git lfs pull` in {folder}")
            yield path
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); see to its permissions") from None


def end_ids(folder: Path) -> list[int]:
    """The ids that end a text by the folder's own settings: generation_config.json before config.json, as transformers.

    InputError if `eos_token_id` in one of them is anything but an id, a list of ids or null.
    """
    return listed_ids(folder / GENERATION) or listed_ids(folder / CONFIG)


def listed_ids(path: Path) -> list[int]:
    """`eos_token_id` of one settings file as a list, which is empty where it says nothing."""
    found = read_settings(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(one) is int for one in ids):
        raise InputError(f"{path}: field 'eos_token_id' is {found!r}; an id or a list of ids is needed")
    return ids


def with_end(path: Path, eos_id: int | None) -> dict[str, Any]:
    """The settings of a file, `eos_id` among the ids that end a text: training appends it, whatever else is there."""
    raw, ids = read_settings(path), listed_ids(path)
    return raw if eos_id is None or eos_id in ids else raw | {"eos_token_id": [*ids, eos_id] if ids else eos_id}


def write_generation(source: Path, eos_id: int | None, out: Path) -> None:
    """Copies generation_config.json, if there is one, as it is, or with `eos_id` among those that end a text."""
    path = source / GENERATION
    if not path.is_file():
        return
    raw = with_end(path, eos_id)
    if raw == read_settings(path):
        shutil.copyfile(path, out / GENERATION)
    else:
        (out / GENERATION).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(tok: Any, out: str | Path) -> None:
    """Writes a tokenizer's files: those that `load_tokenizer` read as they were, else what transformers makes of it.

    Of a class that only transformers 5 has, and of its spelling of special tokens, version 4 is told in its own words.
    """
    out = Path(out)
    if source := getattr(tok, "read_from", None):
        out.mkdir(parents=True, exist_ok=True)
        for path in tokenizer_files(source):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, out / path.name)
        return
    type(tok).save_pretrained(tok, out)
    path = out / TOKENIZER_CONFIG
    if raw := read_settings(path):
        if raw.get("tokenizer_class") == "TokenizersBackend":
            raw["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(raw.get("extra_special_tokens"), list):
            raw["additional_special_tokens"] = raw.pop("extra_special_tokens")
        path.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_new_folder(name: str, folder: Path) -> None:
    """Leaves nothing behind. InputError, beginning with `name`, unless a folder can be put at `folder`.

    One that is there must be empty. What would be made on the way is made and removed again: only that tells.
    """
    folder = Path(os.path.realpath(folder))
    try:
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"{name}: {folder} already exists and is not an empty folder; choose another or remove it")
        if os.path.ismount(folder):
            raise InputError(f"{name}: {folder} is a mount point; choose a folder in it")
        made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=SCRATCH).cleanup()
        finally:
            for path in made:
                if path.is_dir():
                    path.rmdir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot make {folder} ({reason}); choose another") from None
