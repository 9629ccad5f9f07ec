"""Llama in Flax Linen: RMSNorm, rotary positions, grouped-query attention, SwiGLU; one scan over the layers.

Axes as in `reft_jax.types`. Parameters are kept in the type they were given (float32 at init) and cast to the
compute dtype where they are used; norms, rotations and softmax are float32.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.model.cache import KVCache, write_prefix, write_rows
from reft_jax.types import InputError

# What the backward pass keeps of a layer's forward pass. "dots": the results of matrix products with weights.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
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


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair of head dimensions: float32[H/2].

    Scaling "linear" is position interpolation (arXiv 2306.15595); "llama3" is that of Llama 3.1: wavelengths
    beyond the original context are stretched by `factor`, short ones kept, those between interpolated.
    """
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = dict(config.rope_scaling or {})
    if scaling.get("rope_type") == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    return frequencies.astype(np.float32)


def rope_tables(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin float32[B,T,1,H/2] for positions int32[B,T]; the 1 stands for the heads."""
    angles = positions[:, :, None, None].astype(jnp.float32) * rope_frequencies(config)[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B,T,heads,H] in float32; dimension i pairs with i + H/2, the convention of Hugging Face."""
    cos, sin = tables
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x [B,T,D] over its root mean square, times scale [D]; float32 inside, x's dtype outside."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)[None, None, :]).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention: q [B,T,N,H], k [B,K,H,S], v [B,K,S,H], mask bool[1 or B,T,S] -> [B,T,N,H]."""
    batch, length, heads, head_dim = q.shape
    kv_heads, groups = k.shape[1], heads // k.shape[1]
    # The queries of a group are the rows of one matrix, always on the left: a batched product with the cache on
    # the left transposes the cache first, and einsum would choose that order.
    q = q.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, groups * length, head_dim)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = scores.reshape(batch, kv_heads, groups, length, -1)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, kv_heads, groups * length, -1)
    out = jnp.matmul(weights, v).reshape(batch, kv_heads, groups, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim).astype(q.dtype)


def _matrix(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)


def _scale(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.ones, axes)


def _residual(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))


class Block(nn.Module):
    """One layer, in the form that `nn.scan` takes: (carry, layer index, shared inputs) -> (carry, None)."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, carry, layer, tables, mask, positions):
        c = self.config
        x, cache = carry

        def weight(name, shape, *axes):
            return self.param(name, _matrix(*axes), shape).astype(self.dtype)

        def norm(name, x):
            scale = self.param(name, _scale("embed"), (c.hidden_size,))
            return rms_norm(x, scale, c.rms_norm_eps)

        head_axes = ("embed", "kv_heads", "head_dim")
        kv_shape = (c.hidden_size, c.num_kv_heads, c.head_dim)
        y = norm("attention_norm", x)
        q_weight = weight("q", (c.hidden_size, c.num_heads, c.head_dim), "embed", "heads", "head_dim")
        q = rotate(jnp.einsum("BTD,DNH->BTNH", y, q_weight), tables)
        k = rotate(jnp.einsum("BTD,DKH->BTKH", y, weight("k", kv_shape, *head_axes)), tables)
        v = jnp.einsum("BTD,DKH->BTKH", y, weight("v", kv_shape, *head_axes))
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)

        if positions is not None:
            cache = write_rows(cache, layer, positions[:, 0], k[:, :, :, 0], v[:, :, 0])
            span = mask.shape[-1]
            k, v = cache.k[layer, :, :, :, :span], cache.v[layer, :, :, :span]
        elif cache is not None:
            cache = write_prefix(cache, layer, k, v)
        heads = attend(q, k, v, mask)
        o_weight = weight("o", (c.num_heads, c.head_dim, c.hidden_size), "heads", "head_dim", "embed")
        x = _residual(x + jnp.tensordot(heads, o_weight, axes=2))  # einsum would swap N and H and copy the weight

        y = norm("mlp_norm", x)
        gate = jnp.einsum("BTD,DF->BTF", y, weight("gate", (c.hidden_size, c.intermediate_size), "embed", "mlp"))
        up = jnp.einsum("BTD,DF->BTF", y, weight("up", (c.hidden_size, c.intermediate_size), "embed", "mlp"))
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", "length", "mlp"))
        down = weight("down", (c.intermediate_size, c.hidden_size), "mlp", "embed")
        x = _residual(x + jnp.einsum("BTF,FD->BTD", y, down))
        return (x, cache), None


class Unembed(nn.Module):
    """The untied output matrix. A module of its own, so that a trunk without one (a reranker) can run `hidden`."""

    vocab_size: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", _matrix("embed", "vocab"), (hidden.shape[-1], self.vocab_size))
        return jnp.einsum("...D,DV->...V", hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32)


class Llama(nn.Module):
    """The language model. `dtype` is the compute dtype; `remat` is "none", "full" or "dots" (see REMAT_POLICIES)."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        self.embed = self.param("embed", _matrix("vocab", "embed"), (c.vocab_size, c.hidden_size))
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype)
        self.final_norm = self.param("final_norm", _scale("embed"), (c.hidden_size,))
        if not c.tie_embeddings:
            self.lm_head = Unembed(c.vocab_size, self.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens int32[B,T] -> logits float32[B,T,V]. For short inputs: training never builds all logits at once."""
        return self.unembed(self.hidden(tokens)[0])

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
        span: int | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """tokens int32[B,T] -> (hidden dtype[B,T,D] after the final norm, the cache written to or None).

        Without a cache, or with one and without positions (prefill): causal, position = index; a prefill writes
        positions 0..T-1 of every row. With cache and positions int32[B,1] (decode, T = 1): each row writes at its
        own position (one outside the cache is not written) and attends to cache positions s <= position among
        the first `span` (static; all by default).
        """
        if positions is None:
            index = jnp.arange(tokens.shape[1])
            mask = (index[:, None] >= index[None, :])[None]
            tables = rope_tables(self.config, index[None])
        elif cache is None or tokens.shape[1] != 1:
            raise ValueError(f"positions are for decoding one token a row with a cache, got tokens {tokens.shape}")
        else:
            span = cache.k.shape[-1] if span is None else span
            mask = jnp.arange(span)[None, None, :] <= positions[:, :, None]
            tables = rope_tables(self.config, positions)
        # The cache rides in the carry: as scan input and output it would exist twice.
        carry = (_residual(self.embed[tokens].astype(self.dtype)), cache)
        (x, cache), _ = self.layers(carry, jnp.arange(self.config.num_layers), tables, mask, positions)
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps), cache

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [...,D] -> logits float32[...,V]; the product is in the compute dtype, summed in float32."""
        hidden = hidden.astype(self.dtype)
        if not self.config.tie_embeddings:
            return self.lm_head(hidden)
        embed = self.embed.astype(self.dtype)
        return jnp.einsum("...D,VD->...V", hidden, embed, preferred_element_type=jnp.float32)
