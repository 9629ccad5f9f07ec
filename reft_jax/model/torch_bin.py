"""Reads PyTorch's pytorch_model*.bin files without PyTorch: tensors and nothing else.

A .bin file is a pickle, and a pickle may call any function when it is read. The unpickler here knows the names that a
plain state dict needs and refuses every other one, so no code of the file is ever run. Tensors are mapped, not read:
their bytes come from the disk when they are used.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from reft_jax.model.safetensors import DTYPES, LFS_POINTER, check_file
from reft_jax.types import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file that PyTorch before 1.6 wrote
_FLOATS = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}
_OTHERS = ("LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage")


class BinTensor(NamedTuple):
    """A tensor of a .bin file: `key` names its storage, `offset` and `strides` count entries of that storage."""

    storage: str  # PyTorch's name of the type
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Storage(NamedTuple):
    kind: str
    key: str


class BinFile:
    """One .bin file. `tensors` are its floating-point tensors by name, `left_out` the names of the others.

    Raises InputError with the file's name if it is not such a file, is cut, or holds anything but a dict of tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        check_file(path)
        try:
            with path.open("rb") as file:
                self._read(file)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check its owner and mode") from None
        except InputError:
            raise
        except Exception as error:  # pickle raises whatever a damaged stream leads it to
            raise self._error(f"not a PyTorch file ({type(error).__name__})") from None

    def array(self, name: str) -> np.ndarray:
        """Return the tensor, read-only, in the type of the file."""
        tensor = self.tensors[name]
        dtype, start = DTYPES[_FLOATS[tensor.storage]], self._starts[tensor.key]
        flat = np.asarray(np.memmap(self.path, np.uint8, "r")[start:])
        flat = flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)[tensor.offset :]
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    def _read(self, file: BinaryIO) -> None:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise self._error("is a git-lfs pointer, not the file itself", "run `git lfs pull` in its folder")
        zipped = zipfile.is_zipfile(file)
        file.seek(0)
        found = self._read_zip(file) if zipped else self._read_legacy(file)
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise self._error("holds no dict of tensors", "save the model's state_dict()")
        for name, tensor in found.items():
            if not isinstance(tensor, BinTensor):
                raise self._error(f"entry {name!r} is no tensor", "save the model's state_dict()")
            self._check_bounds(name, tensor)
        self.tensors = {name: tensor for name, tensor in found.items() if tensor.storage in _FLOATS}
        self.left_out = [name for name, tensor in found.items() if tensor.storage not in _FLOATS]

    def _read_zip(self, file: BinaryIO) -> Any:
        """The layout of PyTorch 1.6 and later: ROOT/data.pkl, and an uncompressed ROOT/data/KEY for each storage."""
        with zipfile.ZipFile(file) as archive:
            [root] = {name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")}
            names = set(archive.namelist())
            if root + "byteorder" in names and archive.read(root + "byteorder") != b"little":
                raise self._error("written on a big-endian machine", "save it on a little-endian one")
            self._starts, self._sizes = {}, {}
            for info in archive.infolist():
                if info.filename.startswith(root + "data/"):
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise self._error("its entries are compressed", "fetch the original file")
                    file.seek(info.header_offset + 26)  # of the local header: two lengths, then name and extra field
                    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                    key = info.filename.removeprefix(root + "data/")
                    self._starts[key] = info.header_offset + 30 + name + extra
                    self._sizes[key] = info.file_size
            with archive.open(root + "data.pkl") as stream:
                return _Unpickler(stream, self.path).load()

    def _read_legacy(self, file: BinaryIO) -> Any:
        """The layout before 1.6: magic, protocol, system, the dict, the storages' keys, then each: length, data."""
        if _Unpickler(file, self.path).load() != _LEGACY_MAGIC:
            raise self._error("not a PyTorch file")
        _, system = (_Unpickler(file, self.path).load() for _ in range(2))
        if not system["little_endian"]:
            raise self._error("written on a big-endian machine", "save it on a little-endian one")
        unpickler = _Unpickler(file, self.path)
        found, keys = unpickler.load(), _Unpickler(file, self.path).load()
        self._starts, self._sizes = {}, {}
        for key in keys:
            length = int.from_bytes(file.read(8), "little")
            self._starts[key], self._sizes[key] = file.tell(), length * _itemsize(unpickler.kinds[key])
            file.seek(self._sizes[key], 1)
        return found

    def _check_bounds(self, name: str, tensor: BinTensor) -> None:
        numbers = (tensor.offset, *tensor.shape, *tensor.strides)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(tensor.shape) != len(tensor.strides):
            raise self._error(f"tensor {name} has no sound shape")
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        room, needed = (
            self._sizes.get(tensor.key, -1),
            max(last + 1, math.prod(tensor.shape)) * _itemsize(tensor.storage),
        )
        if needed > room or self._starts[tensor.key] + room > self.path.stat().st_size:
            raise self._error(f"tensor {name} lies outside of what the file stores; it may be cut")

    def _error(self, problem: str, remedy: str = "fetch it again") -> InputError:
        return InputError(f"{self.path}: {problem}; {remedy}")


def _itemsize(storage: str) -> int:
    return {"Float": 4, "Half": 2, "BFloat16": 2, "Double": 8, "Long": 8, "Int": 4, "Short": 2}.get(storage[:-7], 1)


class _Unpickler(pickle.Unpickler):
    """Knows the names that a state dict needs. Any other name in the pickle raises InputError; nothing is run."""

    def __init__(self, stream: BinaryIO, path: Path):
        super().__init__(stream)
        self._path = path
        self.kinds: dict[str, str] = {}  # storage -> PyTorch's name of its type

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name in _FLOATS or name in _OTHERS):
            return name

        # A new function per call: a pickle may set attributes on the object that it is given.
        def rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_) -> BinTensor:
            return BinTensor(storage.kind, storage.key, offset, tuple(shape), tuple(strides))

        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise InputError(
                f"{self._path}: asks for {module}.{name}, which is no part of a dict of tensors; nothing was run; save "
                "the model's state_dict() alone"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, _, *view = pid
        if view not in ([], [None]):
            raise InputError(
                f"{self._path}: a storage is a view of another; load and save it with a PyTorch of 2021 or later"
            )
        self.kinds[key] = kind
        return _Storage(kind, key)
