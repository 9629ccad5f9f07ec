"""The safetensors format: a JSON header of names, types, shapes and places, then the arrays one after another.

Files are mapped, not read: only the slices that are used come from the disk, and they do not count as memory of the
process. Files are written one tensor at a time. bfloat16, which the format's NumPy interface does not have, needs no
special case.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from reft_jax.model_folder import LFS_POINTER, check_file, read_bytes
from reft_jax.store import is_remote, origin
from reft_jax.types import InputError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype(np.float64),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # a model's file, or the index of several
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]  # type and shape of each tensor of a file, by name
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """Where a tensor is in a file: `dtype` is safetensors' code, `start` and `nbytes` are bytes of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def map_tensor(stored: Stored, rows: int = 1, part: slice = slice(None)) -> np.ndarray:
    """Return the array in the type of the file, read-only; of an array seen as `rows` rows, only those of `part`.

    Its bytes are read when they are used; those in a bucket at once.
    """
    first, end, _ = part.indices(rows)
    start, size = (stored.nbytes // rows * count for count in (first, end - first))
    array = _bytes(stored.path, stored.start + start, size).view(DTYPES[stored.dtype])
    return array.reshape(stored.shape if rows == 1 else (end - first, -1))


def _bytes(path: Path, start: int, size: int) -> np.ndarray:
    if is_remote(found := origin(path)):
        return np.frombuffer(found.read_range(start, size), np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r", start, (size,)) if size else np.empty(0, "u1"))


def read_header(path: Path) -> dict[str, Stored]:
    """Return every tensor of one file, by name.

    Raises InputError unless the tensors fill the file without gaps from the header to its end, as the format requires.
    """
    size, begin = _look(path)
    length = int.from_bytes(begin[:8], "little")
    start = 8 + length
    if what := _not_safetensors(begin):
        raise InputError(f"{path}: {what}")
    if size < 8 or start > size:
        raise InputError(f"{path}: {size} bytes, shorter than its own header; fetch it again")
    try:
        header = json.loads(read_bytes(path, start)[8:])
        stored = [_stored(path, start, name, info) for name, info in header.items() if name != "__metadata__"]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors header ({error!r:.80}); fetch it again") from None
    end, last = start, "the header"
    for name, tensor in sorted(stored, key=lambda pair: (pair[1].start, pair[1].nbytes)):
        if tensor.start != end:
            how = "overlaps" if tensor.start < end else "leaves a gap after"
            raise InputError(f"{path}: tensor {name} {how} {last}; the file is damaged, fetch it again")
        end, last = end + tensor.nbytes, name
    if size < end:
        raise InputError(f"{path}: {size} bytes, its header promises {end}; the file is cut, fetch it again")
    if size > end:
        raise InputError(f"{path}: {size - end} bytes after the last tensor; the file is damaged, fetch it again")
    return dict(stored)


def _stored(path: Path, start: int, name: str, info: dict) -> tuple[str, Stored]:
    """One entry of a header. Raises ValueError, KeyError or TypeError if it is not one."""
    (begin, end), shape = info["data_offsets"], info["shape"]
    if not all(type(number) is int and number >= 0 for number in (begin, end - begin, *shape)):
        raise ValueError(f"{name}: {shape}, {begin}, {end}")
    if not isinstance(info["dtype"], str):
        raise ValueError(f"{name}: {info['dtype']}")
    return name, Stored(path, info["dtype"], tuple(shape), start + begin, end - begin)


def _look(path: Path) -> tuple[int, bytes]:
    """Size and first bytes of a file. Raises InputError if it is missing or cannot be read."""
    check_file(path)
    return path.stat().st_size, read_bytes(path, 64)


def _not_safetensors(begin: bytes) -> str:
    """What a file with these first bytes is instead, and what to do; empty if it may be safetensors."""
    if begin[8:9] == b"{":
        return ""  # a header; the bytes of its length may be any
    if begin.startswith(LFS_POINTER):
        return "is a git-lfs pointer, not the weights; run `git lfs pull` in the folder"
    if begin.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a PyTorch file under another name; rename it to pytorch_model.bin and convert it"
    if begin.startswith(b"GGUF"):
        return "is a GGUF file; use the unquantized safetensors of the model"
    if begin.lstrip()[:1] == b"<":
        return "is a web page, not the weights; fetch it again"
    return ""


def write_json(path: Path, raw: dict) -> None:
    """Write a JSON file with a line break at its end, as transformers does."""
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def write_shards(folder: Path, shards: Sequence[tuple[Layout, Iterable[np.ndarray]]]) -> None:
    """Write the tensors of a model: one file, or numbered ones with an index. Each shard is as for `write_tensors`."""
    weight_map, total = {}, 0
    for number, (layout, arrays) in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, layout, arrays)
        weight_map |= dict.fromkeys(layout, name)
        total += sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensors(path: Path, layout: Layout, arrays: Iterable[np.ndarray]) -> None:
    """Write a safetensors file: length of the header (8 bytes, little endian), JSON header, one array after another."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers map the data: it must start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (dtype, _), array in zip(layout.values(), arrays, strict=True):
            file.write(np.ascontiguousarray(array, dtype).tobytes())
