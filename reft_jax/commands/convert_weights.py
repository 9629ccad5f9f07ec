"""The command `convert weights`: a folder with pytorch_model*.bin as one with safetensors files, without PyTorch."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from reft_jax.model.hf_folder import check_is_folder
from reft_jax.model.safetensors import Layout, write_shards
from reft_jax.model.torch_bin import BinFile
from reft_jax.model_folder import check_new_folder, read_bytes, read_json, whole_folder
from reft_jax.store import writing
from reft_jax.types import InputError

# Files of weights and optimizers, which are not copied.
WEIGHTS = (".bin", ".bin.index.json", ".safetensors", ".safetensors.index.json", ".pt", ".pth", ".ckpt", ".h5")
INDEX = "pytorch_model.bin.index.json"


def run_convert_weights(source: Path, out_dir: Path) -> None:
    """Writes `out_dir`, whole or not at all: the weights of `source` as safetensors, and copies of its other files.

    Every tensor keeps its name, type and values. Raises InputError before anything is written if `source` has no .bin
    files, if one of them holds anything but tensors, or if `out_dir` is not empty; SaveError if it cannot be written.
    """
    check_new_folder("--out_dir", out_dir)
    files = [BinFile(source / name) for name in _bin_files(source)]
    seen: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in seen:
                raise InputError(f"{file.path}: tensor {name} is also in {seen[name].name}; remove one of the files")
            seen[name] = file.path
        if quantized := next((name for name in file.left_out if name.endswith("weight")), None):
            problem = f"{file.path}: tensor {quantized} holds whole numbers: the weights are quantized"
            raise InputError(f"{problem}; use the unquantized model")
    if not seen:
        raise InputError(f"{source}: its pytorch_model*.bin files hold no tensors; fetch them again")
    others = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.endswith(WEIGHTS)]
    for path in others:
        read_bytes(path, 1)
    with writing(out_dir), whole_folder(out_dir) as target:
        told = [f"{number} of {len(files)}: {file.path.name}" for number, file in enumerate(files, 1)]
        write_shards(target, list(map(_read, files, told)))
        for path in others:
            shutil.copy(path, target / path.name)
    left_out = [name for file in files for name in file.left_out]
    if left_out:
        print(f"left out, because they hold no weights: {', '.join(left_out)}")
    print(f"{source} -> {out_dir}: {len(seen)} tensors")


def _bin_files(source: Path) -> list[str]:
    """The names of the folder's .bin files: those of the index, else pytorch_model.bin. InputError if it has none."""
    check_is_folder(source)
    if os.path.lexists(source / INDEX):
        weight_map = read_json(source / INDEX).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else {None}
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise InputError(f"{source / INDEX}: field 'weight_map' does not name files of its folder; fetch it again")
        return sorted(names)
    if os.path.lexists(source / "pytorch_model.bin"):
        return ["pytorch_model.bin"]
    raise InputError(f"--in: {source} has neither pytorch_model.bin nor {INDEX}; there is nothing to convert")


def _read(file: BinFile, told: str) -> tuple[Layout, Iterator[np.ndarray]]:
    """One file as `write_shards` takes it; prints a line when its turn comes."""
    layout = {tensor: (array.dtype, array.shape) for tensor in file.tensors for array in [file.array(tensor)]}

    def arrays() -> Iterator[np.ndarray]:
        print(told, flush=True)
        yield from map(file.array, layout)

    return layout, arrays()
