"""Hugging Face folders in, without torch: config.json, safetensors, heads. `hf_write.py` writes them.

Their linear weights are [out, in]; ours are [in, out] with the axes of heads split and the layers stacked. A process
reads only the slices that its devices hold, one device after another. When a folder is written, one tensor at a time is
gathered from all devices. So a folder of any size needs little more host memory than the arrays that stay there.
"""

import math
import os
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from reft_jax.model.hf_folder import IGNORED, read_raw_config, stored_in, why_missing
from reft_jax.model.llama import Llama, boxed_shapes
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.safetensors import DTYPES, Stored, map_tensor, read_header
from reft_jax.model_folder import CONFIG
from reft_jax.types import InputError

LM_HEAD = ("lm_head", "kernel")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
TILE = 256  # rows and columns copied at once when a matrix is transposed: two tiles fit in a core's cache
# In its own folder, because loaders of policies read every *.safetensors next to config.json.
VALUE_HEAD_FILE = "value_head/model.safetensors"
OLD_VALUE_HEAD_FILE = "value_head.safetensors"


def read_config(folder: str | Path) -> LlamaConfig:
    """Return the folder's config.json. Raises InputError if it is missing, unreadable or not of a known family."""
    return LlamaConfig.from_hf(read_raw_config(folder), str(Path(folder) / CONFIG))


def check_folder(folder: str | Path, *, reranker: bool = False) -> LlamaConfig:
    """Check a folder by config.json and safetensors headers alone: seconds for any size.

    Raises InputError unless every file has the length that its header says, the index agrees with the files, every
    tensor of the model is there once, with its shape, in float32, float16, bfloat16 or float64, and there is no other.
    `reranker` as for `load_hf`.
    """
    return checked(folder, reranker=reranker)[0]


def load_hf(
    folder: str | Path, *, dtype=jnp.float32, shardings: Any = None, reranker: bool = False
) -> tuple[Llama, dict]:
    """Return model and parameters of a folder, after `check_folder`: `model.apply({"params": params}, tokens)`.

    Args:
        dtype: of every parameter, and the model's compute dtype (`model.clone(dtype=..., remat=...)` changes it).
        shardings: a tree like the parameters. Each process then reads what its devices hold, and reads a part once
            that several of them hold.
        reranker: the folder is that of a classifier with 2 classes (`load_rerank_head`). The parameters then have no
            "lm_head"; `hidden` works.

    Raises: InputError, also if the folder is of the other kind.
    """
    config, stored, shapes = checked(folder, reranker=reranker)
    placement = flatten_dict(shardings) if shardings is not None else {}
    params = {}
    for path, shape in shapes.items():
        inputs, theirs = config.family.tensors[path][1], [stored[name] for name in hf_names(path, config)]
        read = partial(_read_part, path, shape, inputs, theirs, jnp.dtype(dtype))
        if path in placement:
            params[path] = _placed(shape, placement[path], read)
        else:
            params[path] = jax.device_put(read((slice(None),) * len(shape)))
    return Llama(config, dtype=dtype), unflatten_dict(params)


def _placed(shape: tuple[int, ...], sharding, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """Make the array whose part at an index is `read(index)`. Each part leaves the host before the next is read."""
    holders: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        part = read(tuple(slice(*pair) for pair in bounds))
        arrays += [jax.device_put(part, device) for device in devices]
        jax.block_until_ready(arrays[-len(devices) :])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_part(
    path: tuple, shape: tuple[int, ...], inputs: int, stored: list[Stored], dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """Our parameter at `path`, sliced at `index`, from their tensors (one per layer)."""
    layered = path[0] == "layers"
    layers, within = (index[0], index[1:]) if layered else (slice(None), index)
    one = shape[1:] if layered else shape
    outputs = len(one) - inputs
    parts = []
    rows, taken = one[inputs], within[:inputs] + (slice(None),) + within[inputs + 1 :]
    for tensor in stored[layers]:
        # [out, in], both sides split as ours are, then the inputs first: views of the file until `_copy`.
        theirs = map_tensor(tensor, rows, within[inputs]).reshape(-1, *one[inputs + 1 :], *one[:inputs])
        parts.append(theirs.transpose(*range(outputs, len(one)), *range(outputs))[taken])
    whole = np.empty((len(parts), *parts[0].shape), dtype)
    for out, part in zip(whole, parts, strict=True):
        _copy(out, part)
    return whole if layered else whole[0]


def _copy(out: np.ndarray, part: np.ndarray) -> None:
    """out = part, converted. In tiles, because one of the two is read or written across its rows."""
    if out.dtype == part.dtype:  # as integers: NumPy copies a type that it does not know element by element
        bits = f"u{out.itemsize}"
        out, part = out.view(bits), part.view(bits)
    if out.ndim < 2:
        out[...] = part
        return
    for row in range(0, out.shape[0], TILE):
        rows = slice(row, row + TILE)
        for column in range(0, out.shape[-1], TILE):
            columns = slice(column, column + TILE)
            out[rows, ..., columns] = part[rows, ..., columns]


def load_value_head(folder: str | Path) -> dict | None:
    """Return ValueHead's parameters, or None if there are none (TRL's names, in their own file or in the model's)."""
    folder = Path(folder)
    paths = [folder / name for name in (VALUE_HEAD_FILE, OLD_VALUE_HEAD_FILE)]
    path = next(filter(os.path.lexists, paths), None)
    stored = read_header(path) if path else stored_in(folder)
    for prefix in ("v_head.summary.", "v_head."):
        if prefix + "weight" in stored:
            width = read_config(folder).hidden_size
            weight = _read_checked(folder, stored, prefix + "weight", (1, width))
            bias = _read_checked(folder, stored, prefix + "bias", (1,))
            return {"weight": jnp.asarray(weight[0], jnp.float32), "bias": jnp.asarray(bias[0], jnp.float32)}
    return None


def load_rerank_head(folder: str | Path) -> dict | None:
    """Return RerankHead's parameters, None without `score.weight`. Raises InputError unless it has 2 classes."""
    stored = stored_in(folder)
    if "score.weight" not in stored:
        return None
    _check_classes(stored)
    weight = _read_checked(folder, stored, "score.weight", (2, read_config(folder).hidden_size))
    return {"weight": jnp.asarray(weight.T, jnp.float32)}


def stored_type(folder: str | Path) -> np.dtype:
    """The number format of a folder's matrices: that of the first one. Raises InputError if the folder is not whole."""
    config, stored, _ = checked(folder)
    return DTYPES[stored[hf_names(("layers", "q"), config)[0]].dtype]


def hf_names(path: tuple[str, ...], config: LlamaConfig) -> list[str]:
    template = config.family.tensors[path][0]
    return [template.format(i) for i in range(config.num_layers)] if path[0] == "layers" else [template]


def hf_shape(path: tuple[str, ...], shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    """Their shape of our tensor, or of one layer of it: vectors have one axis, matrices two."""
    if inputs:
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return (math.prod(shape),) if path[0] == "layers" else shape


def checked(
    folder: str | Path, *, reranker: bool = False
) -> tuple[LlamaConfig, dict[str, Stored], dict[tuple, tuple[int, ...]]]:
    """Return config, tensors by their names, and the parameters' shapes by our paths, of a folder that is whole.

    A tied matrix may be stored under either name. Raises InputError if anything is missing, unknown or contradictory.
    """
    config, stored = read_config(folder), stored_in(folder)
    _check_heads(folder, config, stored, reranker)
    if config.tie_embeddings and _EMBED not in stored and _HEAD in stored:
        stored = stored | {_EMBED: stored[_HEAD]}
    shapes = {path: shape for path, shape in _shapes(config).items() if not (reranker and path == LM_HEAD)}
    wanted = {}
    for path, shape in shapes.items():
        one = hf_shape(path, shape[1:] if path[0] == "layers" else shape, config.family.tensors[path][1])
        wanted |= dict.fromkeys(hf_names(path, config), one)
    known = wanted.keys() | {_HEAD, "score.weight"}
    unknown = [name for name in stored if name not in known and not name.startswith("v_head.")]
    unknown = [name for name in unknown if not IGNORED.search(name)]
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise InputError(
            f"{folder}: tensor {missing[0]} is missing{_why_missing(folder, missing[0], stored, unknown, config)}"
        )
    for name, shape in wanted.items():
        _checked(folder, stored, name, shape)
    if unknown:
        path, why = stored[unknown[0]].path, _why_unknown(unknown[0], config)
        raise InputError(f"{path}: tensor {unknown[0]} is not part of a {config.family.name}{why}")
    if config.tie_embeddings and not reranker and _HEAD in stored:
        _check_tied(folder, stored, shapes[("embed",)])
    return config, stored, shapes


@cache
def _shapes(config: LlamaConfig) -> dict[tuple, tuple[int, ...]]:
    """Our path -> our shape of every parameter."""
    return {path: box.value.shape for path, box in flatten_dict(boxed_shapes(config)).items()}


def _check_heads(folder: str | Path, config: LlamaConfig, stored: dict[str, Stored], reranker: bool) -> None:
    """Raise InputError unless the folder has the output that is needed: an output matrix, or two classes."""
    if reranker:
        if "score.weight" not in stored:
            raise InputError(f"{folder}: no tensor score.weight; a reranker is a classifier, give the folder of one")
        _check_classes(stored)
    elif _HEAD not in stored and "score.weight" in stored:
        raise InputError(
            f"{stored['score.weight'].path}: a classifier (score.weight of shape {stored['score.weight'].shape}, no "
            f"{_HEAD}), which writes no text; give the folder of a language model"
        )
    elif _HEAD not in stored and _EMBED in stored and not config.tie_embeddings and not why_missing(folder, _HEAD):
        raise InputError(
            f"{folder}: tensor {_HEAD} is missing, and field 'tie_word_embeddings' of {CONFIG} is false or missing; "
            f"set it to true if {_EMBED} is the output matrix too, or fetch the checkpoint again"
        )


def _check_classes(stored: dict[str, Stored]) -> None:
    shape = stored["score.weight"].shape
    if len(shape) != 2 or shape[0] != 2:
        raise InputError(
            f"{stored['score.weight'].path}: tensor score.weight has shape {shape}, but a reranker has 2 classes, "
            "wrong and right; give the folder of one"
        )


def _check_tied(folder: str | Path, stored: dict[str, Stored], shape: tuple[int, ...]) -> None:
    """Raise InputError if a tied output matrix is also stored and has other numbers than the embeddings."""
    tied = [map_tensor(_checked(folder, stored, name, shape)) for name in (_EMBED, _HEAD)]
    for row in range(0, shape[0], 1024):
        embed, head = (np.asarray(matrix[row : row + 1024], np.float32) for matrix in tied)
        if not np.array_equal(embed, head, equal_nan=True):
            raise InputError(
                f"{folder}: field 'tie_word_embeddings' of {CONFIG} is true, but tensor {_HEAD} differs from {_EMBED}; "
                f"set the field to false if {_HEAD} is right, or remove that tensor"
            )


def _why_missing(
    folder: str | Path, name: str, stored: dict[str, Stored], unknown: list[str], config: LlamaConfig
) -> str:
    if listed := why_missing(folder, name):
        return f"{listed}; fetch both again"
    layer = _LAYER.match(name)
    if layer and not any(other.startswith(layer[0]) for other in stored):
        return f" with all of its layer; correct field 'num_hidden_layers' of {CONFIG}, or fetch it again"
    if unknown:
        kind = config.family.name
        return f", and {unknown[0]} is there, which is not part of a {kind}; use a {kind} checkpoint, or fetch it again"
    return "; the checkpoint is incomplete, fetch it again"


def _why_unknown(name: str, config: LlamaConfig) -> str:
    layer = _LAYER.match(name)
    if layer and int(layer[1]) >= config.num_layers:
        return f" of {config.num_layers} layers, as field 'num_hidden_layers' of {CONFIG} says; is this its {CONFIG}?"
    what = f"a bias, and {CONFIG} asks for none there" if name.endswith(".bias") else "of another family"
    return f": it is {what}; use a {config.family.name} checkpoint, or is this not its {CONFIG}?"


def _checked(folder: str | Path, stored: dict[str, Stored], name: str, shape: tuple[int, ...]) -> Stored:
    if name not in stored:
        raise InputError(f"{folder}: tensor {name} is missing; fetch the checkpoint again")
    found = stored[name]
    if found.shape != shape:
        raise InputError(f"{found.path}: tensor {name} has shape {found.shape}, config.json says {shape}")
    if found.dtype not in DTYPES:
        raise InputError(
            f"{found.path}: tensor {name} has type {found.dtype}; convert it to one of {', '.join(DTYPES)}"
        )
    if found.nbytes != math.prod(shape) * DTYPES[found.dtype].itemsize:
        raise InputError(f"{found.path}: tensor {name} has {found.nbytes} bytes, too few or too many for its shape")
    return found


def _read_checked(folder: str | Path, stored: dict[str, Stored], name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.array(map_tensor(_checked(folder, stored, name, shape)))
