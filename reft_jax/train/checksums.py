"""Is what is read what was written? Checksums of arrays, whatever mesh they lie on, and of the files of a folder.

Orbax restores an array whose file has a flipped bit without a word, so both are looked at.
"""

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

MANIFEST = "manifest.json"
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
READERS = 4  # files hashed at once


def array_checksums(tree) -> dict[str, str]:
    """{place in the tree: 8 hex digits} of arrays of at most 32 bits an element.

    Each is a sum modulo 2^32 of the elements' bits times an odd factor that depends on the index: it does not depend on
    the sharding or on the order of adding, every process gets the same, and any change of one element changes it.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sums = jax.device_get(_sums(leaves))
    return {jax.tree_util.keystr(path): f"{int(x):08x}" for path, x in zip(paths, sums, strict=True)}


def digest(checksums: dict[str, str]) -> str:
    """16 hex digits for all of them."""
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()[:16]


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
    index *= np.uint32(0x9E3779B1)  # 2^32 over the golden ratio: neighbours get factors far apart
    return (bits * ((index ^ (index >> 15)) | 1)).sum(dtype=jnp.uint32)


def write_manifest(folder: Path) -> None:
    """Lists every file under `folder` with its size and SHA-256; the list itself appears in one go, and last."""
    files = _hashed(folder)
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("w") as file:
        file.write(_text(files))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_manifest` finished; None if every file is there and as it was."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"no {MANIFEST}: it was only half written"
    try:
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


def _text(files: dict[str, tuple[int, str]]) -> str:
    """With a checksum of its own: a flipped bit in this file is damage too."""
    listed = json.dumps(files, indent=1, sort_keys=True)
    return f'{{"files": {listed},\n"sha256": "{hashlib.sha256(listed.encode()).hexdigest()}"}}\n'


def _hashed(folder: Path) -> dict[str, tuple[int, str]]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    with ThreadPoolExecutor(READERS) as pool:
        return {str(path.relative_to(folder)): entry for path, entry in zip(paths, pool.map(_hash, paths), strict=True)}


def _hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
