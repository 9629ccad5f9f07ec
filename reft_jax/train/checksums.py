"""Checksums that show whether what is read is what was written: of arrays on any mesh, and of files.

Orbax restores an array from a file with a flipped bit and reports nothing, so both are checked.
"""

import hashlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.model_folder import read_json
from reft_jax.store import origin, reading, short_hash, sums, write_whole
from reft_jax.types import InputError

MANIFEST, ARRAYS = "manifest.json", "arrays.json"  # of saved parameters: every file, and a checksum of every array
ADAPTER = "adapter.json"  # of saved parameters that are an adapter: what it is, and of which model (stages/models.py)
MEMORY = "checksums.json"  # in a work directory: what was hashed before
# The files of a Hugging Face folder that decide which tokens a model reads and what it computes.
SMALL, WEIGHTS = (
    ("config.json", "generation_config.json", "*token*", "vocab*", "merges*", "*.model"),
    ("*.safetensors",),
)
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
READERS = 4  # files hashed at once
SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system


def array_checksums(tree) -> dict[str, str]:
    """{place in the tree: 8 hex digits} for arrays of at most 32 bits per element.

    Each is the sum modulo 2^32 of the elements' bits times an odd factor that depends on the index. It does not
    depend on sharding or order of summation, is the same in every process, and changes if any one element does.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sums = jax.device_get(_sums(leaves))
    return {jax.tree_util.keystr(path): f"{int(x):08x}" for path, x in zip(paths, sums, strict=True)}


def digest(checksums: dict[str, str]) -> str:
    """One checksum of all of them, 16 hex digits."""
    return short_hash(json.dumps(checksums, sort_keys=True))


@jax.jit
def _sums(leaves):
    return [_sum(jnp.asarray(x)) for x in leaves]


def _sum(x):
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, BITS[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
    index *= np.uint32(0x9E3779B1)  # 2^32 / golden ratio: neighbouring indices get very different factors
    return (bits * ((index ^ (index >> 15)) | 1)).sum(dtype=jnp.uint32)


def write_manifest(folder: Path) -> None:
    """Lists every file under `folder` with its size and SHA-256; the list itself appears in one go, and last."""
    write_whole(folder / MANIFEST, _text(_hashed(folder)), synced=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest; None if every file exists and is unchanged.

    SaveError if a bucket does not answer: then nobody knows.
    """
    with reading(folder):
        return _damage(folder)


def _damage(folder: Path) -> str | None:
    path = folder / MANIFEST
    if not path.is_file():
        return f"no {MANIFEST}: it was only half written"
    try:
        with reading(path):
            text = path.read_text()
        listed = {name: tuple(entry) for name, entry in json.loads(text)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if text != _text(listed):
        return f"{MANIFEST} is not as it was written"
    found = _hashed(folder)
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} does not belong there"
        if found[name] != listed[name]:
            return f"{name} has another {'size' if found[name][0] != listed[name][0] else 'SHA-256'} than when written"
    return None


def damaged(folder: Path, problem: str | Exception) -> InputError:
    """The error for a model that is not what was saved."""
    return InputError(f"{folder}: the model is damaged ({problem}); restore it from a copy or remove it")


def model_checksum(weights: Path, base: Path, memory: Path) -> str:
    """A checksum of a model, 16 hex digits: its weights, and config.json and tokenizer of `base`. Paths do not matter.

    For saved parameters it uses the checksums of their arrays and reads nothing large; an adapter records the checksum
    of the model that it belongs to. Files of a Hugging Face folder are hashed whole, once: `memory` is a JSON file that
    keeps a hash while inode, size and times of its file stay.

    Raises InputError if files of saved parameters are missing, too many or of another size.
    """
    if (weights / MANIFEST).is_file():
        arrays, large = _saved_arrays(weights), []
        if (weights / ADAPTER).is_file():
            arrays = arrays | read_json(weights / ADAPTER)
    else:
        arrays, large = {}, [path for pattern in WEIGHTS for path in weights.glob(pattern)]
    files = {path for pattern in SMALL for path in base.glob(pattern)} | set(large)
    return digest(arrays | _remembered(sorted(origin(path) for path in files if path.is_file()), memory))


def _saved_arrays(folder: Path) -> dict[str, str]:
    try:
        with reading(folder):
            listed = {name: size for name, (size, _) in json.loads((folder / MANIFEST).read_text())["files"].items()}
            arrays = json.loads((folder / ARRAYS).read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, error) from error
    found = _sizes(folder)
    if different := sorted(name for name in listed | found if listed.get(name) != found.get(name)):
        raise damaged(folder, f"{different[0]} is not as it was written")
    return arrays


def _remembered(paths: list[Path], memory: Path) -> dict[str, str]:
    """{file name: SHA-256}; a file is hashed only if it has changed since it was hashed before."""
    try:
        known = {key: tuple(entry) for key, entry in json.loads(memory.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        known = {}
    marks = {path: _mark(path) for path in paths}
    new = [path for path in paths if marks[path] is None or known.get(str(path), ("",))[0] != marks[path]]
    if new:
        with ThreadPoolExecutor(READERS) as pool:
            known |= {str(path): (marks[path], entry[1]) for path, entry in zip(new, pool.map(_hash, new), strict=True)}
        write_whole(memory, json.dumps({key: entry for key, entry in known.items() if entry[0]}, indent=1) + "\n")
    return {path.name: known[str(path)][1] for path in paths}


def _mark(path: Path) -> str | None:
    """A mark that changes when the file does: nothing can set a ctime back. None if the file is so new that two writes
    may share a mark."""
    at = path.stat()
    if time.time_ns() - at.st_ctime_ns < SETTLED_NS:
        return None
    return f"{at.st_ino} {at.st_size} {at.st_mtime_ns} {at.st_ctime_ns}"


def _text(files: dict[str, tuple[int, str]]) -> str:
    """The text of the file, which has its own checksum: a flipped bit in it is damage too."""
    listed = json.dumps(files, indent=1, sort_keys=True)
    return f'{{"files": {listed},\n"sha256": "{hashlib.sha256(listed.encode()).hexdigest()}"}}\n'


def _sizes(folder: Path) -> dict[str, int]:
    if (known := sums(folder)) is not None:
        return {name: size for name, (size, _) in known.items() if name != MANIFEST}
    return {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}


def _hashed(folder: Path) -> dict[str, tuple[int, str]]:
    """{relative name: (size, SHA-256)}; of a folder in a bucket the store's own checksums, and nothing is read."""
    if (known := sums(folder)) is not None:
        return {name: entry for name, entry in known.items() if name != MANIFEST}
    paths = _files(folder)
    with ThreadPoolExecutor(READERS) as pool:
        return {str(path.relative_to(folder)): entry for path, entry in zip(paths, pool.map(_hash, paths), strict=True)}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]


def _hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
