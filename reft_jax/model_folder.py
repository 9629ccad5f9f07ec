"""The small files of a model folder: the tokenizer's files, the ids that end a text; and whether one can be made.

No JAX: mistakes in these files are found within a second, before anything starts.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from reft_jax.store import as_path, is_remote, reading, upload, why_not_writable
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
SCRATCH = ".reft_jax."  # the name of a folder that is not whole yet begins with this


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a file; the message tells a link to nothing and a folder apart."""
    if os.path.isfile(path):
        return
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(
            f"{path}: is a link to {os.readlink(path)}, which is not there; copy with `cp -L`, or fetch it again"
        )
    if os.path.exists(path):
        raise InputError(f"{path}: is a {'folder' if os.path.isdir(path) else 'device'}, not a file; fetch it again")
    raise InputError(f"{path}: the file is missing; fetch it again")


def read_bytes(path: Path, count: int = -1) -> bytes:
    """Return the first `count` bytes of a file, or all. Raises InputError if it cannot be read."""
    try:
        with reading(path), path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its owner and mode, or the disk") from None


def read_json(path: Path) -> dict:
    """Return the JSON object of a file. Raises InputError."""
    check_file(path)
    text = read_bytes(path)
    if text.startswith(LFS_POINTER):
        raise InputError(f"{path}: is a git-lfs pointer, not the file; run `git lfs pull` in the folder")
    if not text.strip():
        raise InputError(f"{path}: is empty; fetch it again")
    try:
        raw = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON object is needed, this is a {type(raw).__name__}")
    return raw


def read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object of an optional settings file; {} if there is none."""
    return read_json(path) if os.path.lexists(path) else {}


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the folder's tokenizer files, sorted. Raises InputError if one is a link to nothing or cannot be read."""
    try:
        found = os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); check its owner and mode") from None
    paths = [folder / name for name in sorted(found) if any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES)]
    for path in paths:
        if not path.is_dir():
            check_file(path)
            if read_bytes(path, len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(f"{path}: is a git-lfs pointer, not the file; run `git lfs pull` in the folder")
    return paths


def end_ids(folder: Path) -> list[int]:
    """Return the ids that end a text: generation_config.json before config.json, as in transformers.

    Raises InputError if `eos_token_id` in one of them is anything but an id, a list of ids or null.
    """
    return listed_ids(folder / GENERATION) or listed_ids(folder / CONFIG)


def listed_ids(path: Path) -> list[int]:
    """Return `eos_token_id` of one settings file as a list, empty if it is absent or null."""
    found = read_settings(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(one) is int for one in ids):
        raise InputError(f"{path}: field 'eos_token_id' is {found!r}; an id or a list of ids is needed")
    return ids


def check_ids(folder: Path, vocab_size: int) -> None:
    """Raise InputError unless the special ids of the folder are ids, and those that end a text are ids of the model.

    Others may be outside of the vocabulary: Llama 1 has a `pad_token_id` of -1, which means none.
    """
    for path in (folder / CONFIG, folder / GENERATION):
        for index in listed_ids(path):
            if not 0 <= index < vocab_size:
                raise InputError(
                    f"{path}: field 'eos_token_id' has {index}; allowed: 0 to {vocab_size - 1}, the ids of the model"
                )
        settings = read_settings(path)
        for key in ("bos_token_id", "pad_token_id"):
            if (value := settings.get(key)) is not None and type(value) is not int:
                raise InputError(f"{path}: field {key!r} is {value!r}; allowed: an id or null")


def with_end(path: Path, eos_id: int | None) -> dict[str, Any]:
    """Return the settings of a file with `eos_id` among the ids that end a text: training appends it to every row."""
    raw, ids = read_settings(path), listed_ids(path)
    return raw if eos_id is None or eos_id in ids else raw | {"eos_token_id": [*ids, eos_id] if ids else eos_id}


def write_generation(source: Path, eos_id: int | None, out: Path) -> None:
    """Copy generation_config.json, if there is one, with `eos_id` among the ids that end a text."""
    path = source / GENERATION
    if not path.is_file():
        return
    raw = with_end(path, eos_id)
    if raw == read_settings(path):
        shutil.copyfile(path, out / GENERATION)
    else:
        (out / GENERATION).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(tok: Any, out: str | Path) -> None:
    """Write a tokenizer's files: those that `load_tokenizer` read, unchanged; else what transformers makes of it.

    A class that only transformers 5 has, and its name of the special tokens' list, are replaced by those of version 4.
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


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder to fill. It takes the name `folder` at the end, and vanishes if filling it fails."""
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            yield Path(scratch)
            upload(Path(scratch), as_path(folder))
        return
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=SCRATCH) as scratch:
        target = Path(scratch) / "model"
        target.mkdir()
        yield target
        os.replace(target, folder)


def check_new_folder(name: str, folder: Path) -> None:
    """Raise InputError unless a folder can be made at `folder`. The message begins with `name`.

    Leaves nothing behind. A folder that exists must be empty. Missing folders are made and removed again: no other
    check is certain.
    """
    if str(folder).startswith("~"):  # no shell has replaced it, and a folder of that name is not meant
        raise InputError(f"{name}: {folder} begins with '~', which no shell has replaced; write the path out")
    if is_remote(folder):
        if as_path(folder).exists():
            raise InputError(f"{name}: {folder} already exists; choose another or remove it")
        if why := why_not_writable(as_path(folder)):
            raise InputError(f"{name}: cannot make {folder} ({why}); choose another")
        return
    try:
        folder = Path(os.path.realpath(folder))
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
