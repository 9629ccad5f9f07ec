"""Shapes and constants of a Llama, from and to the config.json of Hugging Face."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from reft_jax.types import InputError

ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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

        Fields that old checkpoints leave out (num_key_value_heads, head_dim, rope_theta, ...) take the defaults of
        transformers. InputError, naming `source` and the field, on any other missing field and on anything this
        model does not compute.
        """

        def need(fields: Mapping[str, Any], name: str) -> Any:
            if fields.get(name) is None:
                raise InputError(f"{source}: field {name!r} is missing; use the config.json of a Llama checkpoint")
            return fields[name]

        def only(name: str, supported: Any) -> None:
            if raw.get(name, supported) != supported:
                raise InputError(f"{source}: field {name!r} is {raw[name]!r}; only {supported!r} is supported")

        need(raw, "model_type")
        for name, supported in (
            ("model_type", "llama"),
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
        ):
            only(name, supported)
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        legacy_type = rope.pop("type", "default")
        rope_type = rope.pop("rope_type", legacy_type)
        if rope_type not in ROPE_FIELDS:
            raise InputError(f"{source}: rope type {rope_type!r} is not supported; known: {', '.join(ROPE_FIELDS)}")
        scaling = {name: need(rope, name) for name in ROPE_FIELDS[rope_type]}
        hidden_size, num_heads = need(raw, "hidden_size"), need(raw, "num_attention_heads")
        num_kv_heads = raw.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise InputError(
                f"{source}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        return cls(
            vocab_size=need(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=need(raw, "intermediate_size"),
            num_layers=need(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=raw.get("head_dim") or hidden_size // num_heads,
            rope_theta=float(theta),
            rope_scaling=tuple(sorted({"rope_type": rope_type, **scaling}.items())) if scaling else None,
            rms_norm_eps=need(raw, "rms_norm_eps"),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            max_position_embeddings=need(raw, "max_position_embeddings"),
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
