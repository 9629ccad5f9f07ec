"""Hugging Face folders in, without torch: config.json, safetensors, heads. `hf_write.py` writes them.

Their linear weights are [out, in]; ours are [in, out] with the axes of heads split and the layers stacked. A process
reads the slices that its devices hold, a device at a time, and writes what it gathers of all devices one tensor at a
time: a folder of any size needs little more host memory than what stays there.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import unbox
from flax.traverse_util import flatten_dict, unflatten_dict

from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.safetensors import (
    DTYPES,
    Stored,
    map_tensor,
    read_header,
    read_headers,
    read_json,
)
from reft_jax.types import InputError

# Our path -> their name, and how many leading axes of our tensor (layers aside) are inputs; 0: kept as it is.
_TENSORS = {
    ("embed",): ("model.embed_tokens.weight", 0),
    ("layers", "attention_norm"): ("model.layers.{}.input_layernorm.weight", 0),
    ("layers", "q"): ("model.layers.{}.self_attn.q_proj.weight", 1),
    ("layers", "k"): ("model.layers.{}.self_attn.k_proj.weight", 1),
    ("layers", "v"): ("model.layers.{}.self_attn.v_proj.weight", 1),
    ("layers", "o"): ("model.layers.{}.self_attn.o_proj.weight", 2),
    ("layers", "mlp_norm"): ("model.layers.{}.post_attention_layernorm.weight", 0),
    ("layers", "gate"): ("model.layers.{}.mlp.gate_proj.weight", 1),
    ("layers", "up"): ("model.layers.{}.mlp.up_proj.weight", 1),
    ("layers", "down"): ("model.layers.{}.mlp.down_proj.weight", 1),
    ("final_norm",): ("model.norm.weight", 0),
    ("lm_head", "kernel"): ("lm_head.weight", 1),
}
_LM_HEAD = ("lm_head", "kernel")
TILE = 256  # of a matrix that is turned over: two of them fit in a core's cache
WRAPPER = "pretrained_model."  # prefix of a model saved inside TRL's value-head wrapper
# In a folder of its own: loaders of policies read every *.safetensors that lies beside config.json.
VALUE_HEAD_FILE = "value_head/model.safetensors"
OLD_VALUE_HEAD_FILE = "value_head.safetensors"


def read_config(folder: str | Path) -> LlamaConfig:
    """The folder's config.json; InputError where it is missing, unreadable or asks for what Llama does not compute."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; give a Hugging Face model folder on disk")
    path = Path(folder) / "config.json"
    return LlamaConfig.from_hf(read_json(path), str(path))


def check_folder(folder: str | Path) -> LlamaConfig:
    """Checks a folder by config.json and safetensors headers alone: seconds for any size, no weights are read.

    InputError unless every file has the length its header promises, the index agrees with the files, and every
    tensor of the model is there once, with its shape, in float32, float16 or bfloat16, and no unknown one.
    """
    config = read_config(folder)
    _check_tensors(folder, config, stored_in(folder))
    return config


def load_hf(folder: str | Path, *, dtype=jnp.float32, shardings: Any = None) -> tuple[Llama, dict]:
    """Model and parameters of a folder, after `check_folder`: `model.apply({"params": params}, tokens)`.

    Every parameter becomes `dtype`, which is also the model's compute dtype (`model.clone(dtype=..., remat=...)`
    changes it). `shardings` is a tree like the parameters; each process then reads what its devices hold, and a part
    that several hold once.
    A sequence-classification folder without an output matrix gives parameters without "lm_head": `hidden` works.
    """
    config = read_config(folder)
    stored = stored_in(folder)
    shapes = _check_tensors(folder, config, stored)
    placement = flatten_dict(shardings) if shardings is not None else {}
    params = {}
    for path, shape in shapes.items():
        read = partial(_read_part, path, shape, [stored[name] for name in _names(path, config)], jnp.dtype(dtype))
        if path in placement:
            params[path] = _placed(shape, placement[path], read)
        else:
            params[path] = jax.device_put(read((slice(None),) * len(shape)))
    return Llama(config, dtype=dtype), unflatten_dict(params)


def _placed(shape: tuple[int, ...], sharding, read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """The array whose part at an index `read` gives. Each part leaves the host before the next is read."""
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
    path: tuple, shape: tuple[int, ...], stored: list[Stored], dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """Our parameter at `path`, cut at `index`, from their tensors (one a layer)."""
    inputs, layered = _TENSORS[path][1], path[0] == "layers"
    layers, within = (index[0], index[1:]) if layered else (slice(None), index)
    one = shape[1:] if layered else shape
    outputs = len(one) - inputs
    parts = []
    for tensor in map(map_tensor, stored[layers]):
        # [out, in] with both sides split as ours are, then the inputs first: views of the file until it is cut.
        ours = tensor.reshape(one[inputs:] + one[:inputs]).transpose(*range(outputs, len(one)), *range(outputs))
        parts.append(ours[within])
    whole = np.empty((len(parts), *parts[0].shape), dtype)
    for out, part in zip(whole, parts, strict=True):
        _copy(out, part)
    return whole if layered else whole[0]


def _copy(out: np.ndarray, part: np.ndarray) -> None:
    """out = part, converted. In tiles: one of them is read along its rows and written along the other's."""
    if out.dtype == part.dtype:  # NumPy copies a type it does not know element by element
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
    """ValueHead's parameters, or None where the folder has no value head (TRL's names; beside or in the model)."""
    folder = Path(folder)
    paths = [folder / name for name in (VALUE_HEAD_FILE, OLD_VALUE_HEAD_FILE)]
    path = next((path for path in paths if path.exists()), None)
    stored = read_header(path) if path else stored_in(folder)
    for prefix in ("v_head.summary.", "v_head."):
        if prefix + "weight" in stored:
            width = read_config(folder).hidden_size
            weight = _read_checked(folder, stored, prefix + "weight", (1, width))
            bias = _read_checked(folder, stored, prefix + "bias", (1,))
            return {"weight": jnp.asarray(weight[0], jnp.float32), "bias": jnp.asarray(bias[0], jnp.float32)}
    return None


def load_rerank_head(folder: str | Path) -> dict | None:
    """RerankHead's parameters, or None where the folder has no `score.weight`; InputError unless it has 2 classes."""
    stored = stored_in(folder)
    if "score.weight" not in stored:
        return None
    weight = _read_checked(folder, stored, "score.weight", (2, read_config(folder).hidden_size))
    return {"weight": jnp.asarray(weight.T, jnp.float32)}


def _names(path: tuple[str, ...], config: LlamaConfig) -> list[str]:
    template = _TENSORS[path][0]
    return [template.format(i) for i in range(config.num_layers)] if path[0] == "layers" else [template]


def _hf_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else shape


def _check_tensors(folder: str | Path, config: LlamaConfig, stored: dict[str, Stored]) -> dict[tuple, tuple]:
    """Checks the tensors of a folder against its config; our path -> our shape of the parameters it holds."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    abstract = jax.eval_shape(lambda tokens: unbox(Llama(config).init(jax.random.key(0), tokens)), tokens)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract["params"]).items()}
    if "score.weight" in stored and "lm_head.weight" not in stored:
        shapes.pop(_LM_HEAD, None)
    known = {"lm_head.weight", "score.weight"}
    for path, shape in shapes.items():
        one = shape[1:] if path[0] == "layers" else shape
        for name in _names(path, config):
            _checked(folder, stored, name, _hf_shape(one, _TENSORS[path][1]))
            known.add(name)
    for name in stored.keys() - known:
        if not (name.startswith("v_head.") or name.endswith("rotary_emb.inv_freq")):
            raise InputError(f"{stored[name].path}: tensor {name} is not part of a Llama; is this its config.json?")
    return shapes


def stored_in(folder: str | Path) -> dict[str, Stored]:
    """The tensors of a model folder by their plain names."""
    return {name.removeprefix(WRAPPER): stored for name, stored in read_headers(Path(folder)).items()}


def _checked(folder: str | Path, stored: dict[str, Stored], name: str, shape: tuple[int, ...]) -> Stored:
    if name not in stored:
        raise InputError(f"{folder}: tensor {name} is missing; the checkpoint is incomplete, fetch it again")
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
