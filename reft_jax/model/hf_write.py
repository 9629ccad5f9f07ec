"""Hugging Face folders out, as `hf.py` reads them; without torch, one tensor at a time."""

import math
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from reft_jax.model.hf import LM_HEAD, VALUE_HEAD_FILE, hf_names, hf_shape
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.safetensors import DTYPE_CODES, Layout, write_json, write_shards, write_tensors
from reft_jax.model_folder import CONFIG, check_new_folder, whole_folder, with_end, write_generation, write_tokenizer
from reft_jax.store import as_path
from reft_jax.types import InputError


def save_hf(
    folder: str | Path,
    model: Llama,
    params: dict,
    *,
    value_head: dict | None = None,
    rerank_head: dict | None = None,
    tokenizer: Any = None,
    end_id: int | None = None,
    dtype: Any = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a folder that `load_hf`, transformers (4.57 and 5) and programs built on it read; whole or not at all.

    If several processes hold the parameters, all of them call this and the first one writes.

    Args:
        value_head: goes to a folder inside, which loaders of policies do not read.
        rerank_head: makes the folder a LlamaForSequenceClassification, which has no output matrix: without "lm_head".
        tokenizer: its files are written too, and special ids in config.json and generation_config.json; they come
            from the model folder that it was loaded from.
        end_id: the id that training appends to a row, if it is not the tokenizer's EOS.
        dtype: of the trunk (None: as it is); heads stay float32.

    Raises: InputError if `folder` is not empty or cannot be made, if safetensors has no type `dtype`, or if a number is
        too large for it.
    """
    kind = None if dtype is None else _known_dtype(dtype)
    flat = {path: leaf for path, leaf in flatten_dict(params).items() if rerank_head is None or path != LM_HEAD}
    config = _config_json(model.config, kind or flat[("embed",)].dtype, rerank_head is not None)
    source = Path(getattr(tokenizer, "name_or_path", None) or os.devnull)  # not loaded from a folder: nowhere
    if tokenizer is not None:
        end_id = tokenizer.eos_token_id if end_id is None else end_id
        config |= _special_ids(tokenizer, end_id, source, model.config.vocab_size, rerank_head is not None)
    trunk, value = _layout(model.config, flat, rerank_head, kind), _value_head_layout(value_head)
    if jax.process_index():
        for tensor in trunk + value:
            tensor.make()
        return
    check_new_folder("save_hf", as_path(folder))
    with whole_folder(folder) as target:
        write_json(target / CONFIG, config)
        if tokenizer is not None:
            write_tokenizer(tokenizer, target)
            write_generation(source, end_id, target)
        _write_model(target, trunk, max_shard_bytes)
        if value:
            (target / VALUE_HEAD_FILE).parent.mkdir()
            write_tensors(target / VALUE_HEAD_FILE, *_laid_out(value))


def _known_dtype(dtype: Any) -> np.dtype:
    """Return `dtype` as NumPy's. Raises InputError unless folders may have it."""
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind not in DTYPE_CODES:
        raise InputError(f"dtype={dtype!r}: allowed: {', '.join(known.name for known in DTYPE_CODES)}")
    return kind


def _config_json(config: LlamaConfig, dtype: Any, classifier: bool) -> dict:
    """config.json, its special ids still null: transformers reads missing ones as those of Llama 1."""
    raw = config.to_hf() | {"torch_dtype": jnp.dtype(dtype).name}
    raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if classifier:
        return raw | {"architectures": [f"{config.family.name}ForSequenceClassification"], "num_labels": 2}
    return raw | {"architectures": [f"{config.family.name}ForCausalLM"]}


def _special_ids(tokenizer: Any, end_id: int, source: Path, vocab_size: int, classifier: bool) -> dict:
    """BOS, EOS and padding as in the config.json of `source`, else as the tokenizer has them.

    transformers scores several rows at once only with a padding id that is not in the rows' texts; EOS is such an id.
    """
    base = with_end(source / CONFIG, end_id)
    bos, pad = base.get("bos_token_id", tokenizer.bos_token_id), base.get("pad_token_id")
    candidates = [pad, tokenizer.pad_token_id, *([tokenizer.eos_token_id] if classifier else [])]
    # transformers fails on an id that was added after the vocabulary; in Llama 1, -1 means none.
    pad = next((one for one in candidates if type(one) is int and 0 <= one < vocab_size), None)
    return {"bos_token_id": bos, "eos_token_id": base.get("eos_token_id"), "pad_token_id": pad}


def hf_tensors(
    config: LlamaConfig, params: dict, *, value_head: dict | None = None, rerank_head: dict | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield Hugging Face's name and the array of every tensor of a model, as `save_hf` writes them."""
    for tensor in _layout(config, flatten_dict(params), rerank_head, None) + _value_head_layout(value_head):
        yield tensor.name, tensor.make()


class _Tensor(NamedTuple):
    """A tensor to write. Its header is known before `make` makes the array."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def _layout(config: LlamaConfig, flat: dict, rerank_head: dict | None, dtype: Any) -> list[_Tensor]:
    """The tensors of the trunk, and `score.weight` of a reranker."""

    def make(path: tuple[str, ...], layer: int) -> np.ndarray:
        value = _gathered(flat[path], layer) if path[0] == "layers" else _gathered(flat[path])
        inputs = config.family.tensors[path][1]
        if inputs:
            return value.reshape(math.prod(value.shape[:inputs]), -1).T
        return value.reshape(hf_shape(path, value.shape, 0))

    tensors = []
    for path, (_, inputs) in config.family.tensors.items():
        if path in flat:
            shape = flat[path].shape[1:] if path[0] == "layers" else flat[path].shape
            kind = jnp.dtype(dtype or flat[path].dtype)
            for layer, name in enumerate(hf_names(path, config)):
                made = partial(_converted, name, kind, partial(make, path, layer))
                tensors.append(_Tensor(name, kind, hf_shape(path, shape, inputs), made))
    return tensors + ([_head("score.weight", rerank_head["weight"], np.transpose)] if rerank_head else [])


def _converted(name: str, dtype: np.dtype, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return `make()` as `dtype`. Raises InputError if a number becomes infinite by that."""
    value = make()
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        converted = value.astype(dtype)
    if (lost := np.isinf(converted) & np.isfinite(value)).any():
        largest = float(np.abs(value[lost].astype(np.float32)).max())
        raise InputError(
            f"dtype={dtype.name}: tensor {name} has {largest:g}, more than {dtype.name} holds "
            f"({float(jnp.finfo(dtype).max):g}); choose bfloat16 or float32"
        )
    return converted


def _gathered(leaf, layer: int | None = None) -> np.ndarray:
    """`leaf`, or one layer of it, on the host, gathered from the devices that hold it."""
    if isinstance(leaf, jax.Array):
        spans = not leaf.is_fully_addressable
        where = NamedSharding(leaf.sharding.mesh, PartitionSpec()) if spans else None
        return np.asarray(_taker(layer is None, where)(leaf, layer or 0))
    return leaf if layer is None else leaf[layer]


@cache
def _taker(whole: bool, where: NamedSharding | None):
    return jax.jit(lambda leaf, layer: leaf if whole else leaf[layer], out_shardings=where)


def _value_head_layout(head: dict | None) -> list[_Tensor]:
    """The tensors of a value head under TRL's names."""
    if head is None:
        return []
    return [_head(f"v_head.summary.{name}", head[name], lambda array: array[None]) for name in ("weight", "bias")]


def _head(name: str, leaf: Any, turn: Callable[[np.ndarray], np.ndarray]) -> _Tensor:
    """A head's parameter as their tensor, in float32."""
    shape = turn(np.empty(leaf.shape)).shape
    return _Tensor(name, np.dtype(np.float32), shape, lambda: turn(_gathered(leaf)))


def _write_model(folder: Path, tensors: list[_Tensor], limit: float) -> None:
    """model.safetensors, or numbered shards of at most `limit` bytes with an index."""
    shards, room = [[]], limit
    for tensor in tensors:
        nbytes = tensor.dtype.itemsize * math.prod(tensor.shape)
        if shards[-1] and nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= nbytes
    write_shards(folder, [_laid_out(shard) for shard in shards])


def _laid_out(tensors: list[_Tensor]) -> tuple[Layout, Iterator[np.ndarray]]:
    """What `write_tensors` takes."""
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}, (tensor.make() for tensor in tensors)
