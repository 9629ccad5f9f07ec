"""Shapes and constants of a Llama, from and to the config.json of Hugging Face; what it reads and what it refuses."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from reft_jax.model.config_fields import (
    FLAG,
    OBJECT,
    POSITIVE,
    REQUIRED,
    SIZE,
    Field,
    Kind,
    is_number,
    read_field,
    shown,
)
from reft_jax.types import InputError

_ABSENT = Kind("false; this version computes no biases", lambda value: value is False)
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
    "head_dim": Field(
        Kind("an even whole number up to 65536", lambda value: SIZE.holds(value) and value % 2 == 0 and value <= 65536),
        None,
        null=True,
    ),
    "hidden_act": Field(Kind("'silu', or its other name 'swish'", lambda value: value in ("silu", "swish")), "silu"),
    "max_position_embeddings": Field(SIZE, 2048),
    "rms_norm_eps": Field(Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1), 1e-6),
    "tie_word_embeddings": Field(FLAG, False),
    "attention_bias": Field(_ABSENT, False),
    "mlp_bias": Field(_ABSENT, False),
}

# The types of rotation, and what each needs.
ORIGINAL = "original_max_position_embeddings"
ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": POSITIVE},
    "llama3": {"factor": POSITIVE, "low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE, ORIGINAL: SIZE},
}
ROPE_OBJECTS = ("rope_scaling", "rope_parameters")  # of transformers 4 and 5; the first counts where both are there
_OTHER_ROPES = "; use the checkpoint from before its context was extended, or one of these types"
_DYNAMIC = (
    "; a 'dynamic' one changes nothing up to max_position_embeddings tokens: set the field to null if no text is longer"
)

# What other families' configs have and a Llama's lacks, with the values at which it changes no number (null does not).
# transformers ignores such a field in a Llama's config, so a folder of another family loads and computes nonsense.
FOREIGN = (
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
    | {"is_causal": (True,), "use_rope": (True,), "position_embedding_type": ("rope", "rotary")}
)
# Only Gemma's configs have these, whose norms and embeddings are scaled without a field that says so.
GEMMA = ("use_bidirectional_attention", "hidden_activation")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of a Llama. `rope_scaling` is None or the items of Hugging Face's dict, sorted."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_position_embeddings: int = 2048

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str) -> "LlamaConfig":
        """From the dict of a Hugging Face config.json, written by transformers 4 or 5.

        Absent fields take the defaults of transformers; the shapes must be there. Raises InputError, naming `source`,
        the field, its value and what is allowed, on a value of a wrong type or range, on fields that contradict each
        other, and on anything that this model does not compute.
        """
        check_family(raw, source)
        fields = {name: read_field(raw, name, field, source) for name, field in FIELDS.items()}
        hidden_size, num_heads = fields["hidden_size"], fields["num_attention_heads"]
        num_kv_heads = fields["num_key_value_heads"] or num_heads
        if num_heads % num_kv_heads:
            raise InputError(
                f"{source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        head_dim = fields["head_dim"]
        if head_dim is None:
            head_dim, rest = divmod(hidden_size, num_heads)
            if rest or not FIELDS["head_dim"].kind.holds(head_dim):
                raise InputError(
                    f"{source}: hidden_size {hidden_size} over num_attention_heads {num_heads} must be "
                    f"{FIELDS['head_dim'].kind.words} where field 'head_dim' is missing; correct them"
                )
        rope_theta, rope_scaling = read_rope(raw, source)
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=fields["rms_norm_eps"],
            tie_embeddings=fields["tie_word_embeddings"],
            max_position_embeddings=fields["max_position_embeddings"],
        )

    def to_hf(self) -> dict[str, Any]:
        """The dict of a config.json in the layout of transformers 4, which transformers 5 reads as well."""
        return {
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rope_scaling": dict(self.rope_scaling) if self.rope_scaling else None,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
        }


def check_family(raw: Mapping[str, Any], source: str) -> None:
    """Raises InputError unless the config is a Llama's, by its model_type and by what else it has."""
    if raw.get("model_type") is None:
        raise InputError(f"{source}: field 'model_type' is missing; fetch the config.json of the checkpoint again")
    if raw["model_type"] != "llama":
        raise InputError(
            f"{source}: field 'model_type' is {shown(raw['model_type'])}: this version computes Llama only; another "
            "family's weights as a Llama give wrong numbers; use a Llama checkpoint"
        )
    named = raw.get("architectures")
    for name in named if isinstance(named, list) else [named]:
        if isinstance(name, str) and name.endswith("ForCausalLM") and "llama" not in name.lower():
            raise InputError(
                f"{source}: field 'architectures' names {name}, 'model_type' says \"llama\"; one of them is not this "
                "model's: fetch the config.json of the checkpoint again"
            )
    neutral = dict(FOREIGN)
    if raw.get("use_sliding_window") is False:
        del neutral["sliding_window"]
    if raw.get("no_rope_layers"):
        del neutral["no_rope_layer_interval"]  # only what makes the list where there is none
    wrong = [name for name in GEMMA if name in raw]
    wrong += [name for name, values in neutral.items() if raw.get(name) is not None and raw[name] not in values]
    for name, value in (("layer_types", "full_attention"), ("no_rope_layers", 1)):
        given = raw.get(name) or []
        if not isinstance(given, list) or any(one != value for one in given):
            wrong.append(name)
    if wrong:
        raise InputError(
            f"{source}: field {wrong[0]!r} is {shown(raw[wrong[0]])}: a Llama has no such field and this version does "
            "not compute what it asks for; the weights are another family's, use a Llama checkpoint"
        )


def read_rope(raw: Mapping[str, Any], source: str) -> tuple[float, tuple[tuple[str, Any], ...] | None]:
    """The base and the scaling of the rotation, as `LlamaConfig` has them.

    Where both objects are there, `rope_scaling` counts, as in transformers 4 and 5. Raises InputError, also where two
    fields say different things about one number.
    """
    objects = {name: read_field(raw, name, Field(OBJECT, {}, null=True), source) for name in ROPE_OBJECTS}
    within = next((name for name in ROPE_OBJECTS if objects[name]), "rope_parameters")
    rope = dict(objects[within])
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise InputError(
            f"{source}: field '{within}.{nested[0]}' is an object: a rotation for some layers only, which this version "
            "does not compute; use a Llama checkpoint"
        )
    whole = Kind("1; this version rotates whole heads", lambda value: is_number(value) and value == 1)
    read_field(rope, "partial_rotary_factor", Field(whole, 1, null=True), source, within)
    kind = _rope_type(rope, source, within)
    if kind == "llama3" and raw.get(ORIGINAL) is not None and rope.setdefault(ORIGINAL, raw[ORIGINAL]) != raw[ORIGINAL]:
        raise _differ(source, {ORIGINAL: raw[ORIGINAL], f"{within}.{ORIGINAL}": rope[ORIGINAL]})
    scaling = {
        name: read_field(rope, name, Field(allowed, REQUIRED), source, within)
        for name, allowed in ROPE_FIELDS[kind].items()
    }
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise InputError(
            f"{source}: field '{within}.high_freq_factor' is {scaling['high_freq_factor']}; allowed: a number above "
            f"low_freq_factor, which is {scaling['low_freq_factor']}"
        )
    theta = _rope_theta(raw, objects, within, source)
    return theta, tuple(sorted({"rope_type": kind, **scaling}.items())) if scaling else None


def _rope_type(rope: Mapping[str, Any], source: str, within: str) -> str:
    """The type under its new or its old name; one is needed where there is a factor, which transformers 5 ignores."""
    given = {f"{within}.{name}": rope[name] for name in ("rope_type", "type") if name in rope}
    if len(given) == 2 and rope["rope_type"] != rope["type"]:
        raise _differ(source, given)
    name = "type" if "type" in rope else "rope_type"
    remedy = _DYNAMIC if rope.get(name) == "dynamic" else _OTHER_ROPES if name in rope else ""
    kind = Kind(
        " or ".join(map(repr, ROPE_FIELDS)) + remedy, lambda value: isinstance(value, str) and value in ROPE_FIELDS
    )
    return read_field(rope, name, Field(kind, REQUIRED if "factor" in rope else "default"), source, within)


def _rope_theta(raw: Mapping[str, Any], objects: dict[str, dict], within: str, source: str) -> float:
    """The base: that of the object that counts, or that beside it, or the default; no other may be given."""
    places = [("", raw), *objects.items()]
    stated = [place for place in places if place[1].get("rope_theta") is not None]
    given = {}
    for path, fields in stated or places:
        if "rope_theta" in fields:
            value = read_field(fields, "rope_theta", Field(POSITIVE, None), source, path)
            given[f"{path}.rope_theta" if path else "rope_theta"] = value
    theta = given.get(f"{within}.rope_theta", given.get("rope_theta"))
    if theta is None:
        theta = 10000.0
        given |= {f"{within}.rope_theta by default": theta}
    if any(value != theta for value in given.values()):
        raise _differ(source, given)
    return float(theta)


def _differ(source: str, given: Mapping[str, Any]) -> InputError:
    told = " and ".join(f"'{name}' ({shown(value)})" for name, value in given.items())
    return InputError(f"{source}: fields {told} differ, and programs do not agree on which counts; make them alike")
