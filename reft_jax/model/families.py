"""Model families: how the folders of each `model_type` of config.json are read and written, and what it computes.

You can add a family. Copy the nearest of FAMILIES with the differences in a file of your own, and name it with
`--config.model.family=path.py:NAME`:

    MINE = dataclasses.replace(
        LLAMA, model_type="mine", name="Mine", renamed={"rms_norm_eps": "norm_eps"},
        refused={name: values for name, values in LLAMA.refused.items() if name != "sliding_window"},
    )
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reft_jax import plugins
from reft_jax.model.config_fields import FLAG, REQUIRED, SIZE, Field, Kind, is_number, shown
from reft_jax.types import InputError

SIZE_OR_NULL = Kind(f"{SIZE.words}, or null", lambda value: value is None or SIZE.holds(value))
HEAD_DIM = Kind(
    "an even whole number up to 65536", lambda value: SIZE.holds(value) and value % 2 == 0 and value <= 65536
)
NO_WINDOW = Kind("false; this version computes no window", lambda value: value is False)
FULL = Kind(
    'null or a list of "full_attention"; this version computes no other',
    lambda value: value is None or (isinstance(value, list) and all(one == "full_attention" for one in value)),
)
ROTATED = Kind(
    "a list of 0 and 1, or null",
    lambda value: (
        value is None or (isinstance(value, list) and all(type(one) is int and one in (0, 1) for one in value))
    ),
)
# Fields of config.json that decide about a Llama's numbers. Defaults are those of transformers 5.
FIELDS = {
    "vocab_size": Field(SIZE, REQUIRED),
    "hidden_size": Field(SIZE, REQUIRED),
    "intermediate_size": Field(SIZE, REQUIRED),
    "num_hidden_layers": Field(
        Kind("a whole number from 1 to 10000", lambda value: type(value) is int and 1 <= value <= 10000), REQUIRED
    ),
    "num_attention_heads": Field(SIZE, REQUIRED),
    "num_key_value_heads": Field(SIZE, None, null=True),
    "head_dim": Field(HEAD_DIM, None, null=True),
    "hidden_act": Field(Kind("'silu', or its other name 'swish'", lambda value: value in ("silu", "swish")), "silu"),
    "max_position_embeddings": Field(SIZE, 2048),
    "rms_norm_eps": Field(Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1), 1e-6),
    "tie_word_embeddings": Field(FLAG, False),
    "attention_bias": Field(FLAG, False),
    "mlp_bias": Field(FLAG, False),
}

# Fields of other families' configs, each with the values that change no number (null never does). A Llama has none.
# transformers ignores such a field in a Llama's config: a folder of another family would load and compute nonsense.
REFUSED = (
    dict.fromkeys(
        "sliding_window attention_chunk_size clip_qkv final_logit_softcapping attn_logit_softcapping logit_softcapping "
        "logits_soft_cap query_pre_attn_scalar attention_multiplier scale_depth dim_model_base rotary_dim swiglu_limit "
        "no_rope_layer_interval nope_layer_interval kv_lora_rank".split(),
        (),
    )
    | dict.fromkeys(
        "embedding_multiplier residual_multiplier logits_scaling logit_scale scale_emb lm_head_multiplier "
        "key_multiplier attention_in_multiplier attention_out_multiplier output_multiplier embedding_scale "
        "residual_scale partial_rotary_factor rotary_pct rotary_percent rotary_emb_fraction rope_percent".split(),
        (1,),
    )
    | dict.fromkeys(
        "alibi use_alibi qk_layernorm qk_norm use_qk_norm use_parallel_residual parallel_attn rope_interleaved "
        "rope_interleave scale_embedding use_logn_attn use_dynamic_ntk attn_temperature_tuning "
        "apply_layernorm_1p num_local_experts num_experts n_routed_experts "
        "layernorm_zero_centered_gamma rms_norm_add_unit_offset".split(),
        (False,),
    )
    | {
        "use_sliding_window": (False,),
        "is_causal": (True,),
        "use_rope": (True,),
        "position_embedding_type": ("rope", "rotary"),
    }
)
# Only Gemma's configs have these fields. Gemma scales norms and embeddings, and no field says so.
GEMMA = ("use_bidirectional_attention", "hidden_activation")
GEMMA_TOO = ". A Gemma needs more than a Family: it scales the embeddings and adds 1 to the scales of its norms"


# Our path -> their name, and how many leading axes of our tensor are inputs, not counting the axis of layers; 0: the
# tensor is stored as it is.
TENSORS = {
    ("embed",): ("model.embed_tokens.weight", 0),
    ("layers", "attention_norm"): ("model.layers.{}.input_layernorm.weight", 0),
    ("layers", "q"): ("model.layers.{}.self_attn.q_proj.weight", 1),
    ("layers", "k"): ("model.layers.{}.self_attn.k_proj.weight", 1),
    ("layers", "v"): ("model.layers.{}.self_attn.v_proj.weight", 1),
    ("layers", "q_bias"): ("model.layers.{}.self_attn.q_proj.bias", 0),
    ("layers", "k_bias"): ("model.layers.{}.self_attn.k_proj.bias", 0),
    ("layers", "v_bias"): ("model.layers.{}.self_attn.v_proj.bias", 0),
    ("layers", "q_norm"): ("model.layers.{}.self_attn.q_norm.weight", 0),
    ("layers", "k_norm"): ("model.layers.{}.self_attn.k_norm.weight", 0),
    ("layers", "o"): ("model.layers.{}.self_attn.o_proj.weight", 2),
    ("layers", "o_bias"): ("model.layers.{}.self_attn.o_proj.bias", 0),
    ("layers", "mlp_norm"): ("model.layers.{}.post_attention_layernorm.weight", 0),
    ("layers", "gate"): ("model.layers.{}.mlp.gate_proj.weight", 1),
    ("layers", "gate_bias"): ("model.layers.{}.mlp.gate_proj.bias", 0),
    ("layers", "up"): ("model.layers.{}.mlp.up_proj.weight", 1),
    ("layers", "up_bias"): ("model.layers.{}.mlp.up_proj.bias", 0),
    ("layers", "down"): ("model.layers.{}.mlp.down_proj.weight", 1),
    ("layers", "down_bias"): ("model.layers.{}.mlp.down_proj.bias", 0),
    ("final_norm",): ("model.norm.weight", 0),
    ("lm_head", "kernel"): ("lm_head.weight", 1),
}


@dataclass(frozen=True)
class Family:
    """What differs between families."""

    model_type: str  # as in config.json
    name: str  # its classes in transformers begin with it, as in LlamaForCausalLM
    fields: Mapping[str, Field]  # of config.json, by Llama's names: those that decide about the model's numbers
    refused: Mapping[str, tuple]  # fields that are not computed, with the values at which they change nothing
    tensors: Mapping[tuple[str, ...], tuple[str, int]]  # as TENSORS; embedding and output matrix keep Llama's names
    rope_theta: float = 10000.0  # if the field is absent
    qkv_bias: bool = False  # queries, keys and values have biases, without a field that says so
    qk_norm: bool = False  # the heads of queries and keys are normalized before they are rotated
    constants: Mapping[str, Any] = field(default_factory=dict)  # more fields of the config.json that is written for it
    renamed: Mapping[str, str] = field(default_factory=dict)  # Llama's name of a field -> the family's


LLAMA = Family(
    "llama",
    "Llama",
    FIELDS,
    REFUSED,
    TENSORS,
    constants={"hidden_act": "silu"},
)


def _without(table: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}


_NO_BIASES = {"attention_bias": (False,), "mlp_bias": (False,)}
_OWN_WINDOWS = {"use_sliding_window": Field(NO_WINDOW, False), "layer_types": Field(FULL, None)}
_OF_QWEN = _OWN_WINDOWS | {
    "num_key_value_heads": Field(SIZE_OR_NULL, 32),
    "max_position_embeddings": Field(SIZE, 32768),
}
MISTRAL = Family(
    "mistral",
    "Mistral",
    _without(FIELDS, *_NO_BIASES)
    | {
        "num_key_value_heads": Field(SIZE_OR_NULL, 8),
        "max_position_embeddings": Field(SIZE, 131072),
        "sliding_window": Field(SIZE_OR_NULL, 4096),
    },
    _without(REFUSED, "sliding_window") | _NO_BIASES,
    TENSORS,
    constants={"hidden_act": "silu"},
)
QWEN2 = Family(
    "qwen2",
    "Qwen2",
    _without(FIELDS, *_NO_BIASES) | _OF_QWEN,
    _without(REFUSED, "sliding_window", "use_sliding_window") | {"attention_bias": (), "mlp_bias": (False,)},
    TENSORS,
    qkv_bias=True,
    constants={"hidden_act": "silu", "use_sliding_window": False},
)
QWEN3 = Family(
    "qwen3",
    "Qwen3",
    _without(FIELDS, "mlp_bias") | _OF_QWEN | {"head_dim": Field(HEAD_DIM, 128)},
    _without(REFUSED, "sliding_window", "use_sliding_window") | {"mlp_bias": (False,)},
    TENSORS,
    qk_norm=True,
    constants={"hidden_act": "silu", "use_sliding_window": False},
)
SMOLLM3 = Family(
    "smollm3",
    "SmolLM3",
    FIELDS
    | _OWN_WINDOWS
    | {
        "num_key_value_heads": Field(SIZE_OR_NULL, 4),
        "max_position_embeddings": Field(SIZE, 32768),
        "tie_word_embeddings": Field(FLAG, True),
        "no_rope_layers": Field(ROTATED, None),
        "no_rope_layer_interval": Field(SIZE, 4),
    },
    _without(REFUSED, "sliding_window", "use_sliding_window", "no_rope_layer_interval"),
    TENSORS,
    rope_theta=2e6,
    constants={"hidden_act": "silu", "use_sliding_window": False},
)
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3)}


def use(setting: str, name: str = "model.family") -> None:
    """Make the family known that the setting `model.family` names; "" names none. Raises InputError.

    From then on this process reads and writes folders of its model_type as it says. name: that of the setting or flag,
    for messages.
    """
    if setting:
        family = plugins.load(setting, name)
        if not isinstance(family, Family):
            raise InputError(f"{name}={setting!r} is not a Family of reft_jax/model/families.py; make it one")
        FAMILIES[family.model_type] = family


def family_of(raw: Mapping[str, Any], source: str) -> Family:
    """The family of a config.json. Raises InputError if it is unknown, or if other fields contradict its model_type."""
    model_type = raw.get("model_type")
    if model_type is None:
        raise InputError(f"{source}: field 'model_type' is missing; fetch the config.json of the checkpoint again")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{source}: field 'model_type' is {shown(model_type)}: this version computes {', '.join(FAMILIES)} only; "
            "another family's weights give wrong numbers; use a checkpoint of one of these, or name its Family in "
            "model.family (`solve`, `convert adapter`: --family)"
            f"{GEMMA_TOO if str(model_type).startswith('gemma') else ''}"
        )
    family = FAMILIES[model_type]
    named = raw.get("architectures")
    for name in named if isinstance(named, list) else [named]:
        if isinstance(name, str) and name.endswith("ForCausalLM") and family.name.lower() not in name.lower():
            raise InputError(
                f"{source}: field 'architectures' names {name}, 'model_type' says {shown(model_type)}; one of them is "
                "not this model's: fetch the config.json of the checkpoint again"
            )
    neutral = dict(family.refused)
    if raw.get("use_sliding_window") is False:
        neutral.pop("sliding_window", None)
    if raw.get("no_rope_layers"):
        neutral.pop("no_rope_layer_interval", None)  # it only gives the default of no_rope_layers
    wrong = [name for name in GEMMA if name in raw]
    wrong += [name for name, values in neutral.items() if raw.get(name) is not None and raw[name] not in values]
    for name, value in (("layer_types", "full_attention"), ("no_rope_layers", 1)):
        given = raw.get(name) or []
        if name not in family.fields and (not isinstance(given, list) or any(one != value for one in given)):
            wrong.append(name)
    if wrong:
        raise InputError(
            f"{source}: field {wrong[0]!r} is {shown(raw[wrong[0]])}: a {family.name} has no such field, and this "
            "version does not compute what it asks for; the weights are another family's, use a "
            f"{family.name} checkpoint"
        )
    return family
