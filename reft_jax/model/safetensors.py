"""The safetensors format: a JSON header of names, types, shapes and places, then the arrays one after another.

Files are mapped, not read: what is sliced of a tensor is what comes from the disk, and none of it counts as the
process's own memory. They are written a tensor at a time. bfloat16, which the format's NumPy interface does not know,
needs no special path.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from reft_jax.types import InputError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Stored(NamedTuple):
    """Where a tensor lies: `dtype` is safetensors' code, `start` and `nbytes` are bytes of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def map_tensor(stored: Stored) -> np.ndarray:
    """The array in the type that the file has, read-only; its bytes are read where it is looked at."""
    data = np.memmap(stored.path, np.uint8, "r", stored.start, (stored.nbytes,)) if stored.nbytes else np.empty(0, "u1")
    return np.asarray(data).view(DTYPES[stored.dtype]).reshape(stored.shape)


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of model.safetensors, or of the files that the index names; InputError where they disagree."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise InputError(f"{folder}: neither {single.name} nor {index.name}; save the model as safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: field 'weight_map' is missing; fetch the file again")
    merged: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        for name, stored in read_header(folder / file).items():
            if name in merged:
                raise InputError(f"{stored.path}: tensor {name} is also in {merged[name].path.name}; remove one")
            merged[name] = stored
    for name, file in weight_map.items():
        stored = merged.get(name)
        if stored is None or stored.path.name != file:
            raise InputError(f"{index}: says that tensor {name} is in {file}, but it is not; fetch both again")
    return merged


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file. InputError unless the file is as long as its header promises."""
    if not path.exists():
        raise InputError(f"{path}: the file is missing; fetch it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise InputError(f"{path}: {size} bytes, shorter than its own header; fetch it again")
        try:
            header = json.loads(file.read(start - 8))
        except ValueError as error:
            raise InputError(f"{path}: not a safetensors file ({error}); fetch it again") from None
    stored = {}
    try:
        for name, info in header.items():
            if name != "__metadata__":
                begin, end = info["data_offsets"]
                shape = tuple(map(int, info["shape"]))
                stored[name] = Stored(path, info["dtype"], shape, start + begin, end - begin)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors header ({error!r}); fetch it again") from None
    promised = max((s.start + s.nbytes for s in stored.values()), default=start)
    if size != promised:
        raise InputError(f"{path}: {size} bytes, its header promises {promised}; the file is cut, fetch it again")
    return stored


def read_json(path: Path) -> dict:
    """A JSON object, or InputError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing; is this the folder of a model?") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON object is needed, this is a {type(raw).__name__}")
    return raw


def write_json(path: Path, raw: dict) -> None:
    """With a line break at the end, as transformers writes them."""
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, layout: dict[str, tuple[np.dtype, tuple]], arrays: Iterable[np.ndarray]) -> None:
    """A safetensors file: length of the header (8 bytes, little endian), JSON header, the arrays one after another."""
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
