"""Hugging Face folders in and out, without torch: config.json, safetensors, heads, tokenizer.

Their linear weights are [out, in]; ours are [in, out] with the axes of heads split and the layers stacked.
Files are read and written here, a tensor at a time: a folder of any size needs the host memory of one stack
of layers, and bfloat16 (which safetensors' NumPy interface does not know) needs no special path.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import unbox
from flax.traverse_util import flatten_dict, unflatten_dict

from reft_jax.model.llama import Llama, LlamaConfig
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
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_WRAPPER = "pretrained_model."  # prefix of a model saved inside TRL's value-head wrapper
_VALUE_HEAD_FILE = "value_head.safetensors"


class _Stored(NamedTuple):
    """Where a tensor lies: `dtype` is safetensors' code, `start` and `nbytes` are bytes of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_config(folder: str | Path) -> LlamaConfig:
    """The folder's config.json; InputError where it is missing, unreadable or asks for what Llama does not compute."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; give a Hugging Face model folder on disk")
    path = Path(folder) / "config.json"
    return LlamaConfig.from_hf(_read_json(path), str(path))


def check_folder(folder: str | Path) -> LlamaConfig:
    """Checks a folder by config.json and safetensors headers alone: seconds for any size, no weights are read.

    InputError unless every file has the length its header promises, the index agrees with the files, and every
    tensor of the model is there once, with its shape, in float32, float16 or bfloat16, and no unknown one.
    """
    config = read_config(folder)
    _check_tensors(folder, config, _read_headers(Path(folder)))
    return config


def load_hf(folder: str | Path, *, dtype=jnp.float32, shardings: Any = None) -> tuple[Llama, dict]:
    """Model and parameters of a folder, after `check_folder`: `model.apply({"params": params}, tokens)`.

    Every parameter becomes `dtype`, which is also the model's compute dtype (`model.clone(dtype=..., remat=...)`
    changes it). `shardings` is a tree like the parameters; each process then puts on its devices only their parts.
    A sequence-classification folder without an output matrix gives parameters without "lm_head": `hidden` works.
    """
    config = read_config(folder)
    stored = _read_headers(Path(folder))
    shapes = _check_tensors(folder, config, stored)
    placement = flatten_dict(shardings) if shardings is not None else {}
    params = {}
    for path, shape in shapes.items():
        names, inputs = _names(path, config), _TENSORS[path][1]
        buffer = np.empty(shape, dtype)
        slots = buffer if path[0] == "layers" else [buffer]
        for name, slot in zip(names, slots, strict=True):
            tensor = _read_tensor(stored[name])
            slot[...] = tensor.T.reshape(slot.shape) if inputs else tensor
        if path in placement:
            params[path] = jax.make_array_from_callback(shape, placement[path], buffer.__getitem__)
        else:
            params[path] = jax.device_put(buffer)
    return Llama(config, dtype=dtype), unflatten_dict(params)


def load_value_head(folder: str | Path) -> dict | None:
    """ValueHead's parameters, or None where the folder has no value head (TRL's names; beside or in the model)."""
    folder = Path(folder)
    path = folder / _VALUE_HEAD_FILE
    stored = _read_header(path) if path.exists() else _read_headers(folder)
    for prefix in ("v_head.summary.", "v_head."):
        if prefix + "weight" in stored:
            width = read_config(folder).hidden_size
            weight = _read_checked(folder, stored, prefix + "weight", (1, width))
            bias = _read_checked(folder, stored, prefix + "bias", (1,))
            return {"weight": jnp.asarray(weight[0], jnp.float32), "bias": jnp.asarray(bias[0], jnp.float32)}
    return None


def load_rerank_head(folder: str | Path) -> dict | None:
    """RerankHead's parameters, or None where the folder has no `score.weight`; InputError unless it has 2 classes."""
    stored = _read_headers(Path(folder))
    if "score.weight" not in stored:
        return None
    weight = _read_checked(folder, stored, "score.weight", (2, read_config(folder).hidden_size))
    return {"weight": jnp.asarray(weight.T, jnp.float32)}


def save_hf(
    folder: str | Path,
    model: Llama,
    params: dict,
    *,
    value_head: dict | None = None,
    rerank_head: dict | None = None,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a folder that `load_hf` and transformers read; it appears whole or not at all.

    `dtype` converts the trunk (None: as it is); heads stay float32. With `rerank_head` the folder is a
    LlamaForSequenceClassification, which has no output matrix: "lm_head" is left out. The value head gets a file
    of its own. Parameters must be addressable by this process. InputError if `folder` has anything in it.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: already exists and is not an empty folder; choose another or remove it")
    flat = {path: leaf for path, leaf in flatten_dict(params).items() if rerank_head is None or path != _LM_HEAD}
    config = _config_json(model.config, dtype or flat[("embed",)].dtype, rerank_head is not None, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        target = Path(scratch) / "model"
        target.mkdir()
        _write_json(target / "config.json", config)
        _write_model(target, model.config, flat, rerank_head, dtype, max_shard_bytes)
        if value_head is not None:
            heads = {
                "v_head.summary.weight": np.asarray(value_head["weight"], np.float32)[None],
                "v_head.summary.bias": np.asarray(value_head["bias"], np.float32)[None],
            }
            layout = {name: (head.dtype, head.shape) for name, head in heads.items()}
            _write_tensors(target / _VALUE_HEAD_FILE, layout, heads.values())
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        os.replace(target, folder)


def _config_json(config: LlamaConfig, dtype: Any, classifier: bool, tokenizer: Any) -> dict:
    raw = config.to_hf() | {"torch_dtype": jnp.dtype(dtype).name}
    if classifier:
        raw |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 2}
    else:
        raw |= {"architectures": ["LlamaForCausalLM"]}
    if tokenizer is not None:
        raw |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return raw


def _write_model(folder: Path, config: LlamaConfig, flat: dict, rerank_head: dict | None, dtype: Any, limit: float):
    """The trunk (and `score.weight`) as model.safetensors, or as numbered shards with an index."""

    @lru_cache(maxsize=1)  # the tensors of a stack follow each other: each stack is fetched once
    def fetch(path: tuple[str, ...]) -> np.ndarray:
        return np.asarray(flat[path])

    def tensor(path: tuple[str, ...], layer: int) -> np.ndarray:
        value = fetch(path)[layer] if path[0] == "layers" else fetch(path)
        inputs = _TENSORS[path][1]
        return value.reshape(math.prod(value.shape[:inputs]), -1).T if inputs else value

    layout, sources = {}, {}
    for path, (_, inputs) in _TENSORS.items():
        if path in flat:
            shape = flat[path].shape[1:] if path[0] == "layers" else flat[path].shape
            for layer, name in enumerate(_names(path, config)):
                layout[name] = (jnp.dtype(dtype or flat[path].dtype), _hf_shape(shape, inputs))
                sources[name] = partial(tensor, path, layer)
    if rerank_head is not None:
        score = np.asarray(rerank_head["weight"], np.float32).T
        layout["score.weight"] = (score.dtype, score.shape)
        sources["score.weight"] = lambda: score

    shards, room = [{}], limit
    for name, (kind, shape) in layout.items():
        nbytes = kind.itemsize * math.prod(shape)
        if shards[-1] and nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = (kind, shape)
        room -= nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors(folder / file, shard, (sources[name]() for name in shard))
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_tensors(path: Path, layout: dict[str, tuple[np.dtype, tuple]], arrays: Iterable[np.ndarray]) -> None:
    """A safetensors file: length of the header (8 bytes, little endian), JSON header, the arrays one after another."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers map the data: it must start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (dtype, _), array in zip(layout.values(), arrays, strict=True):
            file.write(np.ascontiguousarray(array, dtype).tobytes())


def _names(path: tuple[str, ...], config: LlamaConfig) -> list[str]:
    template = _TENSORS[path][0]
    return [template.format(i) for i in range(config.num_layers)] if path[0] == "layers" else [template]


def _hf_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else shape


def _check_tensors(folder: str | Path, config: LlamaConfig, stored: dict[str, _Stored]) -> dict[tuple, tuple]:
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


def _checked(folder: str | Path, stored: dict[str, _Stored], name: str, shape: tuple[int, ...]) -> _Stored:
    if name not in stored:
        raise InputError(f"{folder}: tensor {name} is missing; the checkpoint is incomplete, fetch it again")
    found = stored[name]
    if found.shape != shape:
        raise InputError(f"{found.path}: tensor {name} has shape {found.shape}, config.json says {shape}")
    if found.dtype not in _DTYPES:
        raise InputError(
            f"{found.path}: tensor {name} has type {found.dtype}; convert it to one of {', '.join(_DTYPES)}"
        )
    if found.nbytes != math.prod(shape) * _DTYPES[found.dtype].itemsize:
        raise InputError(f"{found.path}: tensor {name} has {found.nbytes} bytes, too few or too many for its shape")
    return found


def _read_checked(folder: str | Path, stored: dict[str, _Stored], name: str, shape: tuple[int, ...]) -> np.ndarray:
    return _read_tensor(_checked(folder, stored, name, shape))


def _read_tensor(stored: _Stored) -> np.ndarray:
    dtype = _DTYPES[stored.dtype]
    data = np.fromfile(stored.path, np.uint8, stored.nbytes, offset=stored.start)
    return data.view(dtype).reshape(stored.shape)


def _read_headers(folder: Path) -> dict[str, _Stored]:
    """Every tensor of model.safetensors, or of the files that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return _read_header(single)
    if not index.exists():
        raise InputError(f"{folder}: neither {single.name} nor {index.name}; save the model as safetensors")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: field 'weight_map' is missing; fetch the file again")
    merged: dict[str, _Stored] = {}
    for file in sorted(set(weight_map.values())):
        for name, stored in _read_header(folder / file).items():
            if name in merged:
                raise InputError(f"{stored.path}: tensor {name} is also in {merged[name].path.name}; remove one")
            merged[name] = stored
    for name, file in weight_map.items():
        stored = merged.get(name.removeprefix(_WRAPPER))
        if stored is None or stored.path.name != file:
            raise InputError(f"{index}: says that tensor {name} is in {file}, but it is not; fetch both again")
    return merged


def _read_header(path: Path) -> dict[str, _Stored]:
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
                stored[name.removeprefix(_WRAPPER)] = _Stored(path, info["dtype"], shape, start + begin, end - begin)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors header ({error!r}); fetch it again") from None
    promised = max((s.start + s.nbytes for s in stored.values()), default=start)
    if size != promised:
        raise InputError(f"{path}: {size} bytes, its header promises {promised}; the file is cut, fetch it again")
    return stored


def _read_json(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing; is this the folder of a model?") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON object is needed, this is a {type(raw).__name__}")
    return raw


def _write_json(path: Path, raw: dict) -> None:
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
