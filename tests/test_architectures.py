"""Every family and option against transformers: logits, gradients, folders both ways, and rollouts in both forms."""

import json
import os
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from tiny import rollouts_on, tiny_config

from reft_jax import load_hf, save_hf
from reft_jax.__main__ import main
from reft_jax.config import default_config
from reft_jax.engine import generate
from reft_jax.model.families import FAMILIES
from reft_jax.model.heads import ValueHead
from reft_jax.model.hf_write import hf_tensors
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.parallel.mesh import check_divides, make_mesh
from reft_jax.plan import flops
from reft_jax.run.machine import make_machine
from reft_jax.tasks.prompts import make_prompter
from reft_jax.tasks.tokenizer import load_tokenizer
from reft_jax.train.state import abstract_params
from reft_jax.types import InputError, Prompt

torch = pytest.importorskip("torch", reason="transformers computes with torch: pip install -e .[test]")
transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(num_hidden_layers=3, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None)
BIASES = {"attention_bias": True, "mlp_bias": True}
# What a model of transformers is made with: the class of its config, and the fields that differ from SMALL.
MODELS = {
    "llama, biases": ("LlamaConfig", BIASES),
    "mistral": ("MistralConfig", {"sliding_window": 16, "head_dim": 8}),
    "mistral, no window": ("MistralConfig", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "qwen3, biases": ("Qwen3Config", {"head_dim": 6, "num_key_value_heads": 1, "attention_bias": True}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "smollm3, biases": ("SmolLM3Config", {"no_rope_layers": [0, 1, 0], "tie_word_embeddings": False, **BIASES}),
}
ROWS = ([3, 14, 15, 9, 26, 53, 58, 9, 7, 9, 2], [2, 7, 18, 28, 18], [5, 60, 1, 1, 44, 9, 31, 2])
LENGTH = 16  # as long as the window of `mistral`


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A random model of transformers; ours with its weights, read from its folder."""
    kind, fields = MODELS[request.param]
    config = getattr(transformers, kind)(**SMALL | fields)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(float("norm" in name), 0.2)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, *load_hf(folder)


def torch_logits(theirs, tokens):
    with torch.no_grad():
        return theirs(torch.tensor(np.asarray(tokens, np.int64))).logits.numpy()


def padded(length: int) -> np.ndarray:
    return np.array([row + [0] * (length - len(row)) for row in ROWS], np.int32)


def test_logits_and_sizes(pair):
    theirs, model, params = pair
    want = torch_logits(theirs, padded(LENGTH))
    assert want.std() > 0.3
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, padded(LENGTH)), want, atol=2e-5)
    assert flops.parameters(model.config) == sum(x.size for x in jax.tree.leaves(params)) == theirs.num_parameters()


def test_gradients_of_an_sft_batch(pair):
    """Of the mean over all tokens after the first two of each row."""
    theirs, model, params = pair
    tokens = padded(11)
    index = np.arange(11)[None]
    target = (index >= 2) & (index < np.array([[len(row)] for row in ROWS]))

    @jax.jit
    @jax.grad
    def gradient(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model.apply({"params": params}, tokens)[:, :-1], tokens[:, 1:]
        )
        return jnp.sum(losses * target[:, 1:]) / target.sum()

    labels = np.where(target, tokens, -100).astype(np.int64)
    theirs.zero_grad()
    theirs(torch.tensor(tokens.astype(np.int64)), labels=torch.tensor(labels)).loss.backward()
    want = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}
    found = dict(hf_tensors(model.config, gradient(params)))
    assert found.keys() == want.keys()
    for name, ours in found.items():
        np.testing.assert_allclose(ours, want[name], atol=1e-5 + 1e-4 * np.abs(want[name]).max(), err_msg=name)


def test_a_folder_that_we_write(pair, tmp_path):
    theirs, model, params = pair
    save_hf(tmp_path / "out", model, params, max_shard_bytes=20_000)
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    np.testing.assert_array_equal(torch_logits(again, padded(LENGTH)), torch_logits(theirs, padded(LENGTH)))
    back, weights = load_hf(tmp_path / "out")
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, weights, params)


@pytest.mark.parametrize("tpu", [False, True], ids=["in place", "beside"])
def test_greedy_rollouts(pair, tpu):
    """Both forms of a decode step give transformers' tokens, with the log-probabilities that training computes."""
    theirs, model, params = pair
    with mock.patch.object(generate, "for_rollouts", rollouts_on("tpu" if tpu else "cpu")):
        engine = generate.Engine(model, make_mesh(1, 1, 1), slots=4, pad_multiple=16, eos_id=61, seed=0)
    asked = [Prompt(f"toy_{i}", 0, np.array(row[:4], np.int32)) for i, row in enumerate(ROWS)]
    found = dict(engine.generate(params, asked, max_len=LENGTH, temperature=0.0))
    prompts = np.array([row[:4] for row in ROWS])
    rows = np.concatenate([prompts, [found[i].tokens for i in range(len(ROWS))]], axis=1)
    want = torch_logits(theirs, rows)[:, 3:-1]
    np.testing.assert_array_equal(rows[:, 4:], want.argmax(-1))
    trained = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, rows))[:, 3:-1]
    trained = np.take_along_axis(np.asarray(trained), rows[:, 4:, None], -1)[..., 0]
    np.testing.assert_allclose([found[i].logprobs for i in range(len(ROWS))], trained, atol=2e-5)


# --- config.json

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_are_as_transformers_has_them(model_type):
    raw = {"model_type": model_type, **{name: SMALL[name] for name in REQUIRED}, "num_attention_heads": 32}
    raw |= {"hidden_size": 64, "num_hidden_layers": 9}
    theirs = transformers.AutoConfig.for_model(**raw)
    ours = LlamaConfig.from_hf(raw, "config.json")
    head_dim = getattr(theirs, "head_dim", None) or 2
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
    assert ours.rms_norm_eps == theirs.rms_norm_eps and ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.sliding_window == (theirs.sliding_window if model_type == "mistral" else None)
    assert ours.o_bias == getattr(theirs, "attention_bias", False) and ours.qkv_bias == (model_type == "qwen2")
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False) and ours.qk_norm == (model_type == "qwen3")
    rotated = getattr(theirs, "no_rope_layers", [1] * 9)
    assert ours.unrotated == tuple(i for i in range(9) if not rotated[i])
    assert LlamaConfig.from_hf(raw | {"num_key_value_heads": None}, "config.json").num_kv_heads == 32


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "'use_sliding_window' is true; allowed: false"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types' is .* null or a list of"),
        ("qwen2", {"mlp_bias": True}, "'mlp_bias' is true: a Qwen2 has no such field"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_scaling.type' is \"yarn\""),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "'layer_types' is"),
        ("qwen3", {"head_dim": None}, "'head_dim' is null; allowed: an even"),
        ("qwen3", {"num_experts": 8}, "'num_experts' is 8: a Qwen3 has no such field"),
        ("mistral", {"attention_bias": True}, "'attention_bias' is true: a Mistral has no such field"),
        ("mistral", {"sliding_window": 0}, "'sliding_window' is 0; allowed: a whole number .* or null"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16}, "'use_sliding_window' is true"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "'no_rope_layers' has 2 entries, and there are 3 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, r"'no_rope_layers' is \[1, 0, 2\]; allowed: a list of 0 and 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "'no_rope_layer_interval' is 0"),
        ("llama", {"no_rope_layers": [1, 0, 1]}, "'no_rope_layers' is .* a Llama has no such field"),
        ("llama", {"use_sliding_window": True}, "'use_sliding_window' is true: a Llama has no such field"),
        ("gemma2", {}, "'model_type' is \"gemma2\": .* A Gemma needs more than a Family: it scales"),
        ("qwen2_moe", {}, "'model_type' is \"qwen2_moe\": this version computes llama, mistral, qwen2, qwen3, smollm3"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(model_type, fields, words):
    with pytest.raises(InputError, match=f"config.json: field {words}"):
        LlamaConfig.from_hf(SMALL | {"model_type": model_type} | fields, "config.json")


def test_windows_that_are_off_change_nothing():
    for model_type in ("qwen2", "qwen3", "smollm3"):
        raw = SMALL | {"model_type": model_type}
        plain = LlamaConfig.from_hf(raw, "config.json")
        for fields in ({"sliding_window": 8}, {"use_sliding_window": False, "max_window_layers": 1}):
            assert LlamaConfig.from_hf(raw | fields, "config.json") == plain
        assert plain.sliding_window is None


def test_rows_must_not_be_longer_than_the_window():
    config = tiny_config(model_type="mistral", sliding_window=16)
    config.check_lengths({"sft.max_len": 16, "rl.max_len": 9})
    with pytest.raises(InputError, match="rl.max_len=17: field 'sliding_window' of config.json is 16, .* at most 16"):
        config.check_lengths({"sft.max_len": 16, "rl.max_len": 17})
    tiny_config().check_lengths({"rl.max_len": 10**6})


def test_a_run_ends_at_once_if_rows_may_be_longer_than_the_window(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(model_type="mistral", sliding_window=1024).to_hf()))
    config = default_config()
    config.sft.max_len = 1025
    with pytest.raises(InputError, match="sft.max_len=1025: .* 'sliding_window' of config.json is 1024"):
        make_machine(config, tmp_path, None, make_mesh(1, 1, 1), after_chunk=None)


def test_the_published_sizes():
    """Parameters of the models in configs/models, as their pages have them."""
    folder = os.path.join(os.path.dirname(__file__), "..", "configs", "models")
    for name, published in (
        ("Qwen2.5-Coder-1.5B", 1_543_714_304),
        ("Qwen2.5-Coder-7B", 7_615_616_512),
        ("Llama-3.1-8B", 8_030_261_248),
        ("CodeLlama-7b-hf", 6_738_546_688),
    ):
        with open(f"{folder}/{name}.json", encoding="utf-8") as file:
            assert flops.parameters(LlamaConfig.from_hf(json.load(file), name)) == published


def test_a_mesh_of_more_than_the_key_value_heads_is_one_line():
    boxed = abstract_params(Llama(tiny_config(vocab_size=64, num_heads=4, num_kv_heads=2)), ValueHead(), "value_head")
    check_divides(AbstractMesh((1, 1, 2), ("data", "fsdp", "tensor")), boxed)
    with pytest.raises(InputError, match=r"kv_heads, 2\) of lm.layers.k .* mesh.tensor can be at most 2, and must"):
        check_divides(AbstractMesh((1, 1, 4), ("data", "fsdp", "tensor")), boxed)


@pytest.mark.long
def test_real_weights_of_qwen(capsys, monkeypatch):
    """Qwen2.5-Coder-0.5B-Instruct: the same first choice at every position of a prompt. `solve` prints the same greedy
    program as transformers', and its answer, 12 · 50 / 60."""
    folder = os.environ.get("QWEN_CODER")
    if not folder:
        pytest.skip("set QWEN_CODER to the folder of Qwen2.5-Coder-0.5B-Instruct")
    question = (
        "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did "
    )
    question += "she earn?"
    prompter = make_prompter(load_tokenizer(folder))
    tokens = np.array([prompter.prompt(question)], np.int32)
    model, params = load_hf(folder)
    ours = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
    del params
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    want = torch_logits(theirs, tokens)
    with capsys.disabled():
        print(f"\n[Qwen2.5-Coder-0.5B: largest difference of {want.size} logits {np.abs(ours - want).max():.1e}]")
    np.testing.assert_array_equal(ours.argmax(-1), want.argmax(-1))
    assert np.abs(ours - want).max() <= 2e-3
    text = theirs.generate(torch.tensor(tokens, dtype=torch.int64), max_length=300, do_sample=False)[0].numpy()
    assert text[-1] in (151643, 151645)  # it ended by itself
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["reft", "solve", f"--model={folder}", "--max_len=300", question])
    main()
    assert capsys.readouterr().out == f"{prompter.answer(text[:-1])}\n\nanswer: 10.0\n"
