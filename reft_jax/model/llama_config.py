"""Shapes and constants of a Llama, from and to the config.json of Hugging Face. families.py has its fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from reft_jax.model.config_fields import OBJECT, POSITIVE, REQUIRED, SIZE, Field, Kind, is_number, read_field, shown
from reft_jax.model.families import FAMILIES, LLAMA, Family, family_of
from reft_jax.model_folder import CONFIG
from reft_jax.types import InputError

# The types of rotation, and the fields that each needs.
ORIGINAL = "original_max_position_embeddings"
ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": POSITIVE},
    "llama3": {"factor": POSITIVE, "low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE, ORIGINAL: SIZE},
}
ROPE_OBJECTS = ("rope_scaling", "rope_parameters")  # of transformers 4 and 5; if both are there, the first counts
_OTHER_ROPES = "; use the checkpoint from before its context was extended, or one of these types"
_DYNAMIC = (
    "; a 'dynamic' one changes nothing up to max_position_embeddings tokens: set the field to null if no text is longer"
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of a model. `rope_scaling` is None or the items of Hugging Face's dict, sorted.

    unrotated: the layers without rotary positions, by index. sliding_window: positions that a token sees, itself
    included; None: all before it. It is not computed: `check_lengths` says whether rows are short enough.
    """

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
    model_type: str = LLAMA.model_type
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    unrotated: tuple[int, ...] = ()
    sliding_window: int | None = None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str) -> "LlamaConfig":
        """Return what the dict of a Hugging Face config.json says, written by transformers 4 or 5.

        Absent fields take the defaults of transformers; the shapes may not be absent. Raises InputError, with `source`,
        the field, its value and what is allowed, for a value of a wrong type or range, for fields that contradict each
        other, and for anything that this model does not compute.
        """
        family = family_of(raw, source)
        theirs = family.renamed
        fields = {name: read_field(raw, theirs.get(name, name), kind, source) for name, kind in family.fields.items()}
        hidden_size, num_heads = fields["hidden_size"], fields["num_attention_heads"]
        num_kv_heads = fields["num_key_value_heads"] or num_heads
        if num_heads % num_kv_heads:
            raise InputError(
                f"{source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        head_dim = fields["head_dim"]
        if head_dim is None:
            head_dim, rest = divmod(hidden_size, num_heads)
            if rest or not family.fields["head_dim"].kind.holds(head_dim):
                raise InputError(
                    f"{source}: hidden_size {hidden_size} over num_attention_heads {num_heads} must be "
                    f"{family.fields['head_dim'].kind.words} if field 'head_dim' is missing; correct them"
                )
        rope_theta, rope_scaling = read_rope(raw, source, family.rope_theta)
        attention_bias = fields.get("attention_bias", False)
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
            model_type=family.model_type,
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=fields.get("mlp_bias", False),
            qk_norm=family.qk_norm,
            unrotated=_unrotated(fields, source) if "no_rope_layers" in fields else (),
            sliding_window=fields.get("sliding_window"),
        )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def check_lengths(self, lengths: Mapping[str, int]) -> None:
        """Raise InputError if a row may be longer than the sliding window; `lengths` has the setting of each limit."""
        for setting, length in lengths.items():
            if self.sliding_window is not None and length > self.sliding_window:
                raise InputError(
                    f"{setting}={length}: field 'sliding_window' of {CONFIG} is {self.sliding_window}, and this "
                    f"version computes no window; set {setting} to at most {self.sliding_window}, or use another model"
                )

    def to_hf(self) -> dict[str, Any]:
        """Return the dict of a config.json in the layout of transformers 4, which transformers 5 reads too."""
        raw = {
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
        if_known = {
            "attention_bias": self.o_bias,
            "mlp_bias": self.mlp_bias,
            "no_rope_layers": [int(i not in self.unrotated) for i in range(self.num_layers)],
            "sliding_window": self.sliding_window,
        }
        raw |= {name: value for name, value in if_known.items() if name in self.family.fields}
        theirs = {self.family.renamed.get(name, name): value for name, value in raw.items()}
        return {"model_type": self.model_type, **self.family.constants, **theirs}


def _unrotated(fields: Mapping[str, Any], source: str) -> tuple[int, ...]:
    """The layers without rotation: those that `no_rope_layers` gives 0, or by default the last of every interval."""
    layers, flags, every = fields["num_hidden_layers"], fields["no_rope_layers"], fields["no_rope_layer_interval"]
    if flags is None:
        return tuple(range(every - 1, layers, every))
    if len(flags) < layers:
        raise InputError(
            f"{source}: field 'no_rope_layers' has {len(flags)} entries, and there are {layers} layers; one is needed "
            "for each"
        )
    return tuple(i for i in range(layers) if not flags[i])


def read_rope(
    raw: Mapping[str, Any], source: str, default_theta: float
) -> tuple[float, tuple[tuple[str, Any], ...] | None]:
    """Return the base and the scaling of the rotation, as `LlamaConfig` has them.

    If both objects are there, `rope_scaling` counts, as in transformers 4 and 5. Raises InputError, also if two fields
    give different values for one number.
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
    theta = _rope_theta(raw, objects, within, source, default_theta)
    return theta, tuple(sorted({"rope_type": kind, **scaling}.items())) if scaling else None


def _rope_type(rope: Mapping[str, Any], source: str, within: str) -> str:
    """The type under its new or its old name, required with a factor: transformers 5 ignores a factor without."""
    given = {f"{within}.{name}": rope[name] for name in ("rope_type", "type") if name in rope}
    if len(given) == 2 and rope["rope_type"] != rope["type"]:
        raise _differ(source, given)
    name = "type" if "type" in rope else "rope_type"
    remedy = _DYNAMIC if rope.get(name) == "dynamic" else _OTHER_ROPES if name in rope else ""
    kind = Kind(
        " or ".join(map(repr, ROPE_FIELDS)) + remedy, lambda value: isinstance(value, str) and value in ROPE_FIELDS
    )
    return read_field(rope, name, Field(kind, REQUIRED if "factor" in rope else "default"), source, within)


def _rope_theta(raw: Mapping[str, Any], objects: dict[str, dict], within: str, source: str, default: float) -> float:
    """The base: of the object that counts, or else of `raw`, or the default. No other value may be given."""
    places = [("", raw), *objects.items()]
    stated = [place for place in places if place[1].get("rope_theta") is not None]
    given = {}
    for path, fields in stated or places:
        if "rope_theta" in fields:
            value = read_field(fields, "rope_theta", Field(POSITIVE, None), source, path)
            given[f"{path}.rope_theta" if path else "rope_theta"] = value
    theta = given.get(f"{within}.rope_theta", given.get("rope_theta"))
    if theta is None:
        theta = default
        given |= {f"{within}.rope_theta by default": theta}
    if any(value != theta for value in given.values()):
        raise _differ(source, given)
    return float(theta)


def _differ(source: str, given: Mapping[str, Any]) -> InputError:
    told = " and ".join(f"'{name}' ({shown(value)})" for name, value in given.items())
    return InputError(f"{source}: fields {told} differ, and programs do not agree on which counts; set both alike")
