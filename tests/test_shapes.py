"""The real model sizes, as shapes only: no weights exist, and everything takes seconds."""

import json

import jax
import numpy as np
import pytest

from reft_jax.model.hf import check_folder
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.types import InputError

# Of the published config.json files: layers, hidden, mlp, heads, kv heads, vocabulary; then the published size.
CODELLAMA = {
    "7B": (32, 4096, 11008, 32, 32, 32016, 6_738_546_688),
    "13B": (40, 5120, 13824, 40, 40, 32016, 13_016_028_160),
    "34B": (48, 8192, 22016, 64, 8, 32000, 33_743_970_304),
}


def config_json(layers, hidden, mlp, heads, kv_heads, vocab) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "pretraining_tp": 1,
        "use_cache": True,
    }


def write_empty_shards(folder, shapes: dict[str, tuple], shards: int) -> None:
    """A bfloat16 checkpoint of holes: true headers and lengths, and no byte of data on the disk."""
    weight_map = {}
    for number in range(shards):
        header, end, file = {}, 0, f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        for name in list(shapes)[number::shards]:
            begin, end = end, end + 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("size", CODELLAMA)
def test_shape_of_codellama_is_the_published_one(size):
    *shape, published = CODELLAMA[size]
    config = LlamaConfig.from_hf(config_json(*shape), f"CodeLlama-{size}")
    assert config.rope_theta == 1e6 and config.head_dim == 128
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published


@pytest.mark.parametrize("size", CODELLAMA)
def test_shape_and_name_of_every_tensor_of_codellama_is_mapped_once(size, tmp_path):
    """The names and shapes are transformers' own; ours must want each of them and nothing else."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    *shape, published = CODELLAMA[size]
    raw = config_json(*shape)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(raw)).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == published
    (tmp_path / "config.json").write_text(json.dumps(raw))
    write_empty_shards(tmp_path, shapes, 3)
    assert check_folder(tmp_path).num_layers == raw["num_hidden_layers"]

    last = f"model.layers.{raw['num_hidden_layers'] - 1}.mlp.down_proj.weight"
    write_empty_shards(tmp_path, {name: shape for name, shape in shapes.items() if name != last}, 3)
    with pytest.raises(InputError, match=f"tensor {last} is missing"):
        check_folder(tmp_path)
