"""Model folders are read and written without loss; broken files give clear messages. (Numbers: test_parity.py.)"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_model

from reft_jax import load_hf, save_hf
from reft_jax.model import safetensors
from reft_jax.model.hf import check_folder, load_rerank_head, load_value_head, read_config
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.types import InputError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def read_header(path):
    """The slow way to a safetensors header: (header, data)."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def write_header(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture
def saved(tmp_path):
    model, params = tiny_model()
    save_hf(tmp_path / "model", model, params)
    return tmp_path / "model"


@pytest.mark.parametrize("shard_bytes", [5e9, 6000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_bitwise(tmp_path, dtype, shard_bytes):
    model, params = tiny_model()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    value = {"weight": jnp.linspace(-1, 1, 24), "bias": jnp.array(0.3)}
    save_hf(tmp_path / "out", model, params, value_head=value, max_shard_bytes=shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shard_bytes < 5e9)
    loaded, again = load_hf(tmp_path / "out", dtype=dtype)
    assert loaded == model.clone(dtype=dtype)
    assert_same(params, again)
    assert_same(value, load_value_head(tmp_path / "out"))
    assert load_rerank_head(tmp_path / "out") is None


def test_files_of_several_types_load_as_one(tmp_path):
    model, params = tiny_model()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    save_hf(tmp_path / "out", model, params, max_shard_bytes=6000)
    first, second, *_ = sorted((tmp_path / "out").glob("*.safetensors"))
    for file, dtype in ((first, np.float32), (second, np.float16)):  # both have every number that is in there
        stored = safetensors.read_header(file)
        layout = {name: (np.dtype(dtype), one.shape) for name, one in stored.items()}
        safetensors.write_tensors(file, layout, [np.array(safetensors.map_tensor(one)) for one in stored.values()])
    assert_same(params, load_hf(tmp_path / "out", dtype=jnp.bfloat16)[1])


def test_parameters_land_on_their_shardings(saved):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, plain = load_hf(saved)
    _, placed = load_hf(saved, shardings=jax.tree.map(lambda _: sharding, plain))
    assert {leaf.sharding for leaf in jax.tree.leaves(placed)} == {sharding}
    assert_same(plain, placed)


def test_old_config_layouts_mean_the_same():
    config = tiny_config(rope_scaling=tuple(sorted(LLAMA3.items())), rope_theta=100.0)
    raw = config.to_hf()
    four = LlamaConfig.from_hf(raw, "four")
    rope = LLAMA3 | {"rope_theta": raw["rope_theta"]}
    rest = {name: value for name, value in raw.items() if name not in ("rope_theta", "rope_scaling")}
    five = LlamaConfig.from_hf(rest | {"rope_parameters": rope}, "five")
    assert four == five == config
    old = LlamaConfig.from_hf(rest | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "old")
    assert dict(old.rope_scaling) == {"rope_type": "linear", "factor": 2.0} and old.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "phi3"}, "field 'model_type' is \"phi3\""),
        ({"hidden_act": "gelu"}, "field 'hidden_act' is \"gelu\"; allowed: "),
        ({"attention_bias": 1}, "'attention_bias' is 1"),
        ({"mlp_bias": None}, "'mlp_bias' is null"),
        ({"hidden_size": None}, "'hidden_size' is null"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "field 'rope_scaling.rope_type' is \"yarn\""),
        ({"rope_scaling": {"rope_type": "linear"}}, "'rope_scaling.factor' is missing"),
    ],
)
def test_unsupported_config_names_file_and_field(saved, changes, words):
    edit_config(saved, **changes)
    with pytest.raises(InputError) as error:
        read_config(saved)
    assert words in str(error.value) and "config.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_broken_files(saved):
    (saved / "model.safetensors").rename(saved / "away")
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        check_folder(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        read_config(saved)
    (saved / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: the file is missing"):
        read_config(saved)


@pytest.mark.parametrize("keep", [3, 100, -1])
def test_a_cut_file_is_named(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: .* bytes, .*fetch it again"):
        check_folder(saved)


def test_tensors_that_do_not_fit_are_named(saved):
    path = saved / "model.safetensors"
    original, data = read_header(path)
    norm, q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"

    def refused(header):
        write_header(path, header, data)
        with pytest.raises(InputError) as error:
            check_folder(saved)
        return str(error.value)

    renamed = {("model.norm.bias" if name == norm else name): info for name, info in original.items()}
    assert f"tensor {norm} is missing" in refused(renamed)
    assert f"tensor {q} has shape (24, 32), config.json says (32, 24)" in refused(
        original | {q: original[q] | {"shape": [24, 32]}}
    )
    assert f"tensor {q} has type I32" in refused(original | {q: original[q] | {"dtype": "I32"}})
    assert f"tensor {q} has 3072 bytes" in refused(original | {q: original[q] | {"dtype": "BF16"}})
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert f"tensor {bias} is not part" in refused(original | {bias: nothing})
    write_header(path, original | {"model.layers.0.self_attn.rotary_emb.inv_freq": nothing}, data)
    check_folder(saved)


def test_index_and_files_must_agree(tmp_path):
    model, params = tiny_model()
    save_hf(tmp_path / "out", model, params, max_shard_bytes=6000)
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    wrong = index["weight_map"] | {"model.norm.weight": first}
    path.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(InputError, match=r"says that tensor model\.norm\.weight is in"):
        check_folder(tmp_path / "out")
    path.write_text(json.dumps(index))
    (tmp_path / "out" / last).rename(tmp_path / "away")
    with pytest.raises(InputError, match=f"{last}: the file is missing"):
        check_folder(tmp_path / "out")


def test_saving_never_overwrites_and_leaves_nothing_behind(saved):
    model, params = tiny_model(seed=1)
    with pytest.raises(InputError, match="already exists"):
        save_hf(saved, model, params)

    class BrokenTokenizer:
        bos_token_id = eos_token_id = pad_token_id = 0

        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_hf(saved.parent / "second", model, params, tokenizer=BrokenTokenizer())
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_special_ids_come_from_the_tokenizer(tmp_path):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, "<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    save_hf(tmp_path / "out", *tiny_model(), tokenizer=tokenizer)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 1
