"""config.json: every field by its type and range; numbers as transformers reads them, or a refusal in one line."""

import json

import pytest
import transformers
from tiny import tiny_config

from reft_jax.model.families import FAMILIES, FIELDS, REFUSED
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.types import InputError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
INSIDE = {name: value for name, value in LLAMA3.items() if not name.startswith("original")}
LINEAR = {"type": "linear", "factor": 4.0}


def plain(*absent, **changes) -> dict:
    """The config.json of a tiny Llama in the oldest layout, with fields changed and fields taken out."""
    raw = {name: value for name, value in tiny_config().to_hf().items() if not name.startswith("rope_")} | changes
    return {name: value for name, value in raw.items() if name not in absent}


def refusal(raw: dict) -> str:
    with pytest.raises(InputError) as error:
        LlamaConfig.from_hf(raw, "folder/config.json")
    line = str(error.value)
    assert line.startswith("folder/config.json: ") and "\n" not in line and len(line) < 400
    return line


# --- Types and ranges

NO_SIZES = ["320", 48.0, 0, -1, True, None, float("nan"), float("inf"), 2**31, 10**400, [320], {}]
NO_NUMBERS = ["1e-5", True, None, float("nan"), float("inf"), -1e-5, 10**400, [1.0]]
WRONG = {
    "vocab_size": NO_SIZES,
    "hidden_size": NO_SIZES,
    "intermediate_size": NO_SIZES,
    "num_hidden_layers": [*NO_SIZES, 10001],
    "num_attention_heads": NO_SIZES,
    "num_key_value_heads": [value for value in NO_SIZES if value is not None],
    "head_dim": [11, 2**30, *(value for value in NO_SIZES if value is not None)],
    "hidden_act": ["gelu", "relu2", "SiLU", None, True, 1, ["silu"]],
    "max_position_embeddings": NO_SIZES,
    "rms_norm_eps": [*NO_NUMBERS, 2],
    "tie_word_embeddings": ["false", "true", None, 0, 1, 0.0, []],
    "attention_bias": ["true", None, "false", 0, 1],
    "mlp_bias": ["true", None, "false", 0, 1],
}


def test_every_field_is_tried():
    assert WRONG.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(name):
    for value in WRONG[name]:
        line = refusal(plain(**{name: value}))
        assert f"field '{name}' is {json.dumps(value)[:40]}" in line and "; allowed: " in line


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 1e-300])
def test_wrong_numbers_of_the_rotation(value):
    for raw, name in (
        (plain(rope_theta=value), "rope_theta"),
        (plain(rope_parameters={"rope_type": "default", "rope_theta": value}), "rope_parameters.rope_theta"),
        (plain(rope_scaling=LINEAR | {"factor": value}), "rope_scaling.factor"),
        (plain(rope_scaling=LLAMA3 | {"low_freq_factor": value}), "rope_scaling.low_freq_factor"),
        (plain(rope_scaling=LLAMA3 | {"original_max_position_embeddings": value}), "rope_scaling.original_max_pos"),
    ):
        assert f"field '{name}" in refusal(raw)


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_shapes_must_be_there(name):
    assert f"field '{name}' is missing; it must be a whole number" in refusal(plain(name))


def test_absent_fields_are_as_transformers_has_them():
    absent = [name for name, field in FIELDS.items() if isinstance(field.default, str | int | float) or field.null]
    raw = plain(*absent)
    theirs, ours = transformers.LlamaConfig.from_dict(raw), LlamaConfig.from_hf(raw, "config.json")
    assert len(absent) == 8
    assert ours.rms_norm_eps == theirs.rms_norm_eps and ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (4, 6)
    assert LlamaConfig.from_hf(plain(hidden_act="swish"), "config.json") == LlamaConfig.from_hf(plain(), "config.json")


def test_heads_must_divide():
    assert "num_attention_heads 4 is not a multiple of num_key_value_heads 3" in refusal(plain(num_key_value_heads=3))
    for hidden_size in (26, 20, 4 * 10**6):
        assert f"hidden_size {hidden_size} over" in refusal(plain(hidden_size=hidden_size, head_dim=None))


# --- Rotation

ROPES = [
    plain(),
    plain(rope_theta=1000000),
    plain(rope_theta=1e6, rope_scaling={}),
    plain(rope_scaling=LINEAR),
    plain(rope_scaling={"rope_type": "linear", "factor": 4}),
    plain(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0}, rope_theta=1e5),
    plain(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=None),
    plain(rope_parameters={"rope_type": "default"}, rope_theta=5e5),
    plain(rope_theta=5e5, rope_scaling=LLAMA3),
    plain(rope_parameters=LLAMA3 | {"rope_theta": 5e5}),
    plain(rope_parameters=LLAMA3 | {"rope_theta": 5e5}, rope_scaling=None),
    plain(rope_theta=5e5, rope_scaling=INSIDE, original_max_position_embeddings=32),
    plain(rope_theta=5e5, rope_scaling=LLAMA3, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    plain(rope_theta=5e5, rope_scaling=LINEAR, rope_parameters=LLAMA3 | {"rope_theta": 5e5}),
    plain(rope_scaling=LINEAR | {"rope_theta": 5e5}),
]


@pytest.mark.parametrize("raw", ROPES)
def test_rope_fields_mean_what_they_mean_to_transformers(raw):
    config = transformers.LlamaConfig.from_dict(json.loads(json.dumps(raw)))
    config.standardize_rope_params()  # as their rotation calls it
    theirs = {name: value for name, value in config.rope_parameters.items() if name != "type"}
    ours = LlamaConfig.from_hf(raw, "config.json")
    assert ours.rope_theta == theirs.pop("rope_theta")
    assert dict(ours.rope_scaling or {"rope_type": "default"}) == theirs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ('rope_scaling.type\' is "dynamic"', "set the field to"),
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ("rope_parameters.rope_type'", "from before its")),
        ({"rope_scaling": {"type": "longrope"}}, ('rope_scaling.type\' is "longrope"', "use the checkpoint")),
        ({"rope_scaling": {"type": ["linear"]}}, ('rope_scaling.type\' is ["linear"]',)),
        ({"rope_scaling": {"rope_type": None, "factor": 4.0}}, ("rope_scaling.rope_type' is null",)),
        ({"rope_scaling": {"factor": 4.0}}, ("rope_scaling.rope_type' is missing",)),
        ({"rope_scaling": "linear"}, ("'rope_scaling' is \"linear\"; allowed: an object or null",)),
        ({"rope_scaling": ["linear", 4.0]}, ("'rope_scaling' is [\"linear\", 4.0]",)),
        ({"rope_scaling": {"type": "linear"}}, ("rope_scaling.factor' is missing",)),
        ({"rope_scaling": INSIDE}, ("rope_scaling.original_max_position_embeddings' is missing",)),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ("rope_scaling.high_freq_factor' is 1.0", "low_freq")),
        ({"rope_scaling": LINEAR | {"rope_type": "default"}}, ('rope_scaling.rope_type\' ("default")', "differ")),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, ("'rope_theta' (500000.0)", "differ")),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}}, ("rope_theta' (500000.0)", "by default'")),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}, ("embeddings' (32)", "differ")),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("rope_parameters.partial_rotary_factor' is 0.5",)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ("rope_parameters.full_attention'",)),
    ],
)
def test_ropes_that_are_not_computed_or_not_clear(changes, words):
    line = refusal(plain(**changes))
    assert all(word in line for word in words), line


# --- Other families

SMALL = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
EDITED = {
    "MistralConfig": {"sliding_window": 32},
    "GraniteConfig": {},
    "GemmaConfig": {"head_dim": 6},
    "Gemma2Config": {"head_dim": 6},
    "Gemma3TextConfig": {"head_dim": 6},
    "SmolLM3Config": {"num_hidden_layers": 4, "pad_token_id": 0},
    "CohereConfig": {},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "Phi3Config": {"sliding_window": 16, "pad_token_id": 0},
    "StableLmConfig": {"num_key_value_heads": 4},
    "MixtralConfig": {},
}


@pytest.mark.parametrize("family", EDITED)
def test_another_familys_config_is_refused_as_it_is_and_edited(family):
    raw = getattr(transformers, family)(**SMALL | EDITED[family]).to_dict()
    if raw["model_type"] not in FAMILIES:
        line = refusal(raw)
        assert f"'model_type' is \"{raw['model_type']}\"" in line and "edit" not in line
    line = refusal(raw | {"model_type": "llama", "architectures": None, "hidden_act": "silu"})
    assert "a Llama has no such field" in line or "partial_rotary_factor" in line, line


@pytest.mark.parametrize("name", REFUSED)
def test_a_foreign_field_counts_unless_it_is_neutral(name):
    for value in REFUSED[name]:
        LlamaConfig.from_hf(plain(**{name: value}), "config.json")
    LlamaConfig.from_hf(plain(**{name: None}), "config.json")
    assert f"field '{name}' is 0.375" in refusal(plain(**{name: 0.375}))


def test_fields_that_are_neutral_in_company():
    for changes in (
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1], "no_rope_layer_interval": 4},
        {"architectures": ["MyLlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "mine.My"}, "pretraining_tp": 2},
    ):
        LlamaConfig.from_hf(plain(**changes), "config.json")
    for changes in (
        {"sliding_window": 4096, "use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"no_rope_layers": [1, 0]},
        {"use_bidirectional_attention": None},
    ):
        assert "a Llama has no such field" in refusal(plain(**changes))
    assert "names GemmaForCausalLM" in refusal(plain(architectures=["GemmaForCausalLM"]))


def test_no_model_type():
    for raw in (plain("model_type"), plain(model_type=None)):
        assert "field 'model_type' is missing; fetch" in refusal(raw)
    for value in ("LLaMA", "code_llama", "mllama", ["llama"], 3):
        assert f"field 'model_type' is {json.dumps(value)}: this version" in refusal(plain(model_type=value))
