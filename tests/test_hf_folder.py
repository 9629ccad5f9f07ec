"""Weights in the forms that people have: read as transformers reads them, or refused in one line that names it."""

import json
import shutil

import numpy as np
import pytest
from test_hf import assert_same, edit_config, read_header, write_header
from tiny import tiny_model, tiny_policy

from reft_jax import load_hf, load_rerank_head, save_hf
from reft_jax.model.hf import check_folder, checked
from reft_jax.model.safetensors import map_tensor, write_tensors
from reft_jax.model.safetensors import read_header as tensors_of
from reft_jax.types import InputError

EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of one tiny model: "plain", "tied" (another one), "shards" (with an index) and "reranker"."""
    folder, (model, params) = tmp_path_factory.mktemp("made"), tiny_model()
    save_hf(folder / "plain", model, params)
    save_hf(folder / "shards", model, params, max_shard_bytes=6000)
    save_hf(folder / "tied", *tiny_model(tie_embeddings=True))
    policy, heads = tiny_policy("rerank_head")
    save_hf(folder / "reranker", policy, heads["lm"], rerank_head=heads["rerank_head"])
    return folder


@pytest.fixture
def copy(made, tmp_path):
    def copy(name: str = "plain"):
        return shutil.copytree(made / name, tmp_path / name)

    return copy


def rewrite(folder, change) -> None:
    """The weights as `change` makes them of {name: array}, in its order."""
    path = folder / "model.safetensors"
    arrays = {name: np.array(map_tensor(stored)) for name, stored in tensors_of(path).items()}
    arrays = change(arrays) or arrays
    write_tensors(path, {name: (x.dtype, x.shape) for name, x in arrays.items()}, arrays.values())


def change_header(folder, change) -> None:
    header, data = read_header(folder / "model.safetensors")
    write_header(folder / "model.safetensors", change(header) or header, data)


def refusal(folder, **kinds) -> str:
    with pytest.raises(InputError) as error:
        check_folder(folder, **kinds)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def says(line: str, *words: str) -> None:
    assert all(word in line for word in words), line


def renamed(prefix: str):
    return lambda arrays: {prefix + name: x for name, x in arrays.items()}


# --- Names and ties


def test_a_tied_matrix_under_either_name_or_under_both(copy):
    folder = copy("tied")
    want = load_hf(folder)[1]
    rewrite(folder, lambda arrays: arrays.update({HEAD: arrays[EMBED]}))
    assert_same(want, load_hf(folder)[1])
    rewrite(folder, lambda arrays: arrays.pop(EMBED) is None)
    assert_same(want, load_hf(folder)[1])
    assert checked(folder)[1][EMBED].nbytes  # what `check` compares the loaded weights with


@pytest.mark.parametrize("row", [0, 60])
def test_a_tied_matrix_with_another_one_stored_is_refused(copy, row):
    folder = copy("tied")

    def one_number_differs(arrays):
        arrays[HEAD] = arrays[EMBED].copy()
        arrays[HEAD][row, 3] += 1e-3

    rewrite(folder, one_number_differs)
    says(refusal(folder), "'tie_word_embeddings' of config.json is true", f"{HEAD} differs", "set the field to false")


def test_no_output_matrix_names_the_field(copy):
    for name, value in (("plain", False), ("tied", False), ("tied", None)):
        folder = copy(name)
        if name == "plain":
            rewrite(folder, lambda arrays: arrays.pop(HEAD) is None)
        edit_config(folder, tie_word_embeddings=value)
        if value is None:
            raw = json.loads((folder / "config.json").read_text())
            del raw["tie_word_embeddings"]
            (folder / "config.json").write_text(json.dumps(raw))
        says(refusal(folder), f"tensor {HEAD} is missing", "'tie_word_embeddings'", "set it to true")
        shutil.rmtree(folder)


def test_names_without_model_are_read(copy):
    folder = copy()
    want = load_hf(folder)[1]
    rewrite(folder, lambda arrays: {name.removeprefix("model."): x for name, x in arrays.items()})
    assert_same(want, load_hf(folder)[1])
    rewrite(folder, renamed("pretrained_model."))
    assert_same(want, load_hf(folder)[1])


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "language_model.", "model.language_model.", "x.y."]
)
def test_a_wrappers_prefix_is_named(copy, prefix):
    folder = copy()
    rewrite(folder, renamed(prefix))
    says(refusal(folder), f"names begin with '{prefix}'", "save")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", ("not merged", "merge_and_unload()")),
        ("model.layers.1.self_attn.k_proj.base_layer.weight", ("not merged", "merge_and_unload()")),
        ("layers.0.attention.wq.weight", ("Meta's own layout", "Hugging Face format")),
        ("model.layers.0.self_attn.qkv_proj.weight", ("several matrices in one", "use a Llama")),
        ("model.layers.0.self_attn.q_proj.bias", ("is not part of a Llama", "a bias", "use a Llama")),
        ("model.layers.1.self_attn.q_norm.weight", ("is not part of a Llama", "another family", "use a Llama")),
        ("model.layers.2.mlp.up_proj.weight", ("is not part of a Llama of 2 layers", "'num_hidden_layers'")),
    ],
)
def test_tensors_of_something_else_are_named_always_the_same_first(copy, name, words):
    folder = copy()
    for order in (1, -1):
        extra = [name, name.replace("weight", "weight2") + "2"][::order]
        rewrite(folder, lambda arrays, extra=extra: arrays | dict.fromkeys(extra, np.zeros(3, np.float32)))
        says(refusal(folder), f"tensor {name} ", *words)
        rewrite(folder, lambda arrays, extra=extra: {name: x for name, x in arrays.items() if name not in extra})


def test_known_buffers_count_for_nothing(copy):
    folder = copy()
    want = load_hf(folder)[1]
    attention = "model.layers.1.self_attn."
    buffers = ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "bias", "masked_bias", "k_proj.k_scale", "v_scale"]
    rewrite(folder, lambda arrays: arrays | {attention + name: np.ones(1, np.float32) for name in buffers})
    assert_same(want, load_hf(folder)[1])


def test_float64_and_layers_that_are_missing(copy):
    folder = copy()
    want = load_hf(folder)[1]
    rewrite(folder, lambda arrays: {name: x.astype(np.float64) for name, x in arrays.items()})
    assert_same(want, load_hf(folder)[1])
    edit_config(folder, num_hidden_layers=3)
    says(refusal(folder), "tensor model.layers.2.", "with all of its layer", "'num_hidden_layers'")
    edit_config(folder, num_hidden_layers=2)
    rewrite(
        folder, lambda arrays: {name.replace("input_layer", "post_feedforward_layer"): x for name, x in arrays.items()}
    )
    says(refusal(folder), "input_layernorm.weight is missing, and", "post_feedforward_layernorm.weight is there")


# --- Quantized weights


@pytest.mark.parametrize(
    ("extra", "dtype", "config", "words"),
    [
        (None, "F8_E4M3", {"quantization_config": {"quant_method": "fp8"}}, 'quantization_config says "fp8"'),
        (None, "F8_E4M3", {}, f"(tensor {Q} has type F8_E4M3)"),
        (".weight_scale", "F8_E4M3", {"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-ten"),
        (".qweight", "I32", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, 'says "gptq"'),
        (".weight.absmax", "U8", {"quantization_config": {"quant_method": "bitsandbytes"}}, 'says "bitsandbytes"'),
        (".SCB", "I8", {"quantization_config": {"quant_method": "bitsandbytes"}}, 'says "bitsandbytes"'),
        (".input_scale", "F32", {"quantization_config": {"quant_method": "modelopt"}}, 'says "modelopt"'),
        (".W_q", "U8", {"quantization_config": {"quant_method": "hqq"}}, 'says "hqq"'),
        (".codebooks", "F16", {"quantization_config": {"quant_method": "aqlm"}}, 'says "aqlm"'),
        (".weight_scales", "F32", {"quantization_config": {"quant_method": "eetq"}}, 'says "eetq"'),
        (".scales", "U32", {"quantization": {"group_size": 64, "bits": 4}}, 'quantization says {"group_size": 64'),
    ],
)
def test_quantized_weights_are_named_as_such(copy, extra, dtype, config, words):
    folder = copy()
    edit_config(folder, **config)
    if extra:
        name = Q.removesuffix(".weight") + extra
        rewrite(folder, lambda arrays: arrays | {name: np.ones(3, np.float32)})
    else:
        header, _ = read_header(folder / "model.safetensors")
        change_header(folder, lambda header: header | {Q: header[Q] | {"dtype": dtype}})
    says(refusal(folder), "the weights are quantized", words, "use the unquantized model")


def test_floats_load_whatever_the_config_says_of_quantization(copy):
    folder = copy()
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    check_folder(folder)


# --- Classifiers


def test_a_classifier_is_no_policy_and_a_policy_no_reranker(copy):
    policy, reranker = copy(), copy("reranker")
    with pytest.raises(InputError, match="a classifier .*writes no text; give the folder of a language model"):
        load_hf(reranker)
    assert set(load_hf(reranker, reranker=True)[1]) == {"embed", "layers", "final_norm"}
    with pytest.raises(InputError, match=r"no tensor score\.weight; a reranker is a classifier"):
        load_hf(policy, reranker=True)
    rewrite(reranker, lambda arrays: arrays | {"score.weight": arrays["score.weight"][:1]})
    for load in (load_rerank_head, lambda folder: load_hf(folder, reranker=True)):
        with pytest.raises(InputError, match=r"score\.weight has shape \(1, 24\), but a reranker has 2 classes"):
            load(reranker)
