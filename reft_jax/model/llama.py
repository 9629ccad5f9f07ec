"""Llama in Flax Linen, for training and scoring: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Its relatives have biases, norms of the heads, or layers without rotation, as LlamaConfig says. A parameter that a model
does not have does not exist.

The weights of all layers are stacked, and `nn.scan` runs over them: only one layer is compiled. The backward pass
computes it again (`model.remat`). Rollouts use `layer` below, or its twin in decode.py, with weights that
rollout_weights.py makes from these.

Axes as in `reft_jax.types`. Parameters keep the type they were given (float32 at init) and are cast to the compute
dtype where they are used; norms, rotations and softmax are float32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.model.attention import attend_causally
from reft_jax.model.cache import KVCache
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.quantized import Array, Quantized, matmul

# What the backward pass keeps of a layer's forward pass. "dots": the results of matrix products with weights.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# The logical axes of a layer's parameters, in the order in which `init` draws them.
LAYER_AXES = {
    "attention_norm": ("embed",),
    "q": ("embed", "heads", "head_dim"),
    "k": ("embed", "kv_heads", "head_dim"),
    "v": ("embed", "kv_heads", "head_dim"),
    "o": ("heads", "head_dim", "embed"),
    "mlp_norm": ("embed",),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "q_bias": ("heads", "head_dim"),
    "k_bias": ("kv_heads", "head_dim"),
    "v_bias": ("kv_heads", "head_dim"),
    "o_bias": ("embed",),
    "gate_bias": ("mlp",),
    "up_bias": ("mlp",),
    "down_bias": ("embed",),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
}
# Those that only some models have, by the field of LlamaConfig that says so.
OPTIONAL = {
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "o_bias": ("o_bias",),
    "mlp_bias": ("gate_bias", "up_bias", "down_bias"),
    "qk_norm": ("q_norm", "k_norm"),
}


# What the names of an adapter's two matrices end in (model/lora.py).
LORA_A, LORA_B = "_lora_a", "_lora_b"


def layer_axes(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """LAYER_AXES of the parameters that a layer of this model has."""
    absent = {name for field, names in OPTIONAL.items() if not getattr(config, field) for name in names}
    return {name: axes for name, axes in LAYER_AXES.items() if name not in absent}


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair of head dimensions: float32[H/2].

    Scaling "linear" is position interpolation (arXiv 2306.15595). "llama3" is that of Llama 3.1, with C the original
    context: wavelengths beyond C / low_freq_factor are stretched by `factor`, those below C / high_freq_factor are
    kept, those between are interpolated.
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


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, axis: int = -1) -> jax.Array:
    """x divided by its root mean square along `axis`, times scale [D]. Computed in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis, keepdims=True) + eps)
    along = np.delete(np.arange(x.ndim), axis)
    return (y * jnp.expand_dims(scale.astype(jnp.float32), along)).astype(x.dtype)


def sums(dtype):
    """The type in which to ask for a product of two arrays of `dtype`.

    float32, because only then does XLA's CPU backend use the machine's bfloat16 instructions. On a TPU `dtype`: it sums
    in float32 all the same, and a result that goes over the tensor axis has half the bytes.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device  # None: no mesh is set
    return dtype if device is not None and device.platform == "tpu" else jnp.float32


def product(x: jax.Array, weight: Array) -> jax.Array:
    """x @ weight, in x's dtype."""
    if isinstance(weight, Quantized):
        return matmul(x, weight).astype(x.dtype)
    return jnp.matmul(x, weight, preferred_element_type=sums(x.dtype)).astype(x.dtype)


@jax.custom_vjp
def project(x: jax.Array, *weights: Array) -> tuple[jax.Array, ...]:
    """x [B,T,D] times each weight [D,F] -> [B,T,F] each, in x's dtype. A quantized weight has no gradient.

    One function for all products of x, because its gradient is a sum over them. So that is added before it goes over
    the tensor axis: one collective instead of one for each weight.
    """
    return tuple(product(x, weight) for weight in weights)


def _project_forward(x, *weights):
    return tuple(product(x, weight) for weight in weights), (x, weights)


def _project_backward(kept, gradients):
    x, weights = kept
    pairs = list(zip(gradients, weights, strict=True))[::-1]  # in the order in which JAX would add
    if x.dtype == jnp.bfloat16:  # `einsum`, because XLA's CPU backend has no bfloat16 product with a transposed matrix
        einsum = partial(jnp.einsum, preferred_element_type=sums(x.dtype))
        to_x = reduce(jnp.add, (einsum("BTF,DF->BTD", y, weight) for y, weight in pairs))
        return to_x.astype(x.dtype), *(einsum("BTD,BTF->DF", x, y).astype(x.dtype) for y in gradients)

    def to_weight(y):
        # Rows as one axis, behind a barrier. Without it, XLA's CPU backend fuses the transposes into the computations
        # of x and y, and these then write column by column.
        rows, outs = jax.lax.optimization_barrier((x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])))
        return rows.T @ outs

    return reduce(jnp.add, (y @ weight.T for y, weight in pairs)), *map(to_weight, gradients)


project.defvjp(_project_forward, _project_backward)


def logits_of(hidden: jax.Array, matrix: jax.Array, axes: str) -> jax.Array:
    """hidden [...,D] times the output matrix, axes "VD" or "DV" -> logits float32[...,V]."""
    if hidden.dtype == jnp.bfloat16:
        return _logits_in_bfloat16(axes, hidden, matrix)
    return jnp.einsum(f"...D,{axes}->...V", hidden, matrix, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits_in_bfloat16(axes, hidden, matrix):
    return jnp.einsum(f"...D,{axes}->...V", hidden, matrix, preferred_element_type=jnp.float32)


def _logits_forward(axes, hidden, matrix):
    return _logits_in_bfloat16(axes, hidden, matrix), (hidden, matrix)


def _logits_backward(axes, kept, y):
    # The gradient of the logits is rounded as that of every other product is. In float32, so would be the products.
    hidden, matrix = kept
    y, sums = y.astype(hidden.dtype), {"preferred_element_type": jnp.float32}
    to_hidden = jnp.einsum(f"BWV,{axes}->BWD", y, matrix, **sums)
    to_matrix = jnp.einsum(f"BWD,BWV->{axes}", hidden, y, **sums)
    return to_hidden.astype(hidden.dtype), to_matrix.astype(matrix.dtype)


_logits_in_bfloat16.defvjp(_logits_forward, _logits_backward)


def _matrix(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)


def _scale(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.ones, axes)


def _bias(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.zeros, axes)


def residual(x: jax.Array) -> jax.Array:
    """x [B,T,D] between layers. In training its positions are spread over the tensor axis (parallel/mesh.py)."""
    return nn.with_logical_constraint(x, ("batch", "act_length", "act_embed"))


def gathered(x: jax.Array) -> jax.Array:
    """x [B,T,D] with all positions of a row on each device, as the products with a layer's weights need them."""
    return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))


def linear(weights: Mapping[str, jax.Array], names: Sequence[str], x: jax.Array) -> list[jax.Array]:
    """x [B,T,D] times each named matrix [D,F], plus its bias [F] and its adapter [D,r], [r,F], if any -> [B,T,F]."""
    found = []
    for name, y in zip(names, project(x, *(weights[name] for name in names)), strict=True):
        bias, a = weights.get(f"{name}_bias"), weights.get(name + LORA_A)
        if a is not None:
            y = y + project(*project(x, a), weights[name + LORA_B])[0]
        found.append(y if bias is None else y + bias[None, None])
    return found


def layer(config: LlamaConfig, weights: Mapping[str, jax.Array], x: jax.Array, tables, attention: Callable):
    """One layer: x dtype[B,T,D] -> (x, what `attention` keeps).

    Args:
        weights: by the names of LAYER_AXES; norms [D] or [H], matrices [in, out] and biases [out] in x's dtype. With
            an adapter also its matrices, [in, rank] and [rank, out].
        tables: those of the positions, of `rope_tables`; None: this layer does not rotate.
        attention: (q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> (heads [B,T,N,H], anything to keep).
    """
    y = gathered(rms_norm(x, weights["attention_norm"], config.rms_norm_eps))
    q, k, v = (z.reshape(*y.shape[:2], -1, config.head_dim) for z in linear(weights, "qkv", y))
    if config.qk_norm:
        q, k = (rms_norm(z, weights[name], config.rms_norm_eps) for z, name in ((q, "q_norm"), (k, "k_norm")))
    if tables is not None:
        q, k = rotate(q, tables), rotate(k, tables)
    heads, kept = attention(q, k, v)
    x = residual(x + linear(weights, "o", heads.reshape(*x.shape[:2], -1))[0])

    y = gathered(rms_norm(x, weights["mlp_norm"], config.rms_norm_eps))
    gate, up = linear(weights, ("gate", "up"), y)
    y = nn.silu(gate) * up
    y = nn.with_logical_constraint(y, ("batch", "length", "mlp"))
    return residual(x + linear(weights, ("down",), y)[0]), kept


def causal_attention(mask: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KVCache]:
    """The `attention` of whole rows, mask bool[1 or B,T,T]; keeps keys and values in the cache's layout."""
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    return attend_causally(q, k, v, mask), KVCache(k, v)


def causal_inputs(config: LlamaConfig, tokens: jax.Array, positions: jax.Array | None = None):
    """(tables, mask bool[1,T,T]) of rows tokens int32[B,T] in which position = index, or `positions`."""
    index = jnp.arange(tokens.shape[1])
    tables = rope_tables(config, index[None] if positions is None else positions)
    return tables, (index[:, None] >= index[None, :])[None]


class Block(nn.Module):
    """One layer with its parameters, in the form that `nn.scan` takes: (x, shared inputs, own input) -> (x, None)."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, tables, mask, rotated=None):
        """x dtype[B,T,D], mask bool[1 or B,T,T]; rotated bool[]: whether this layer rotates, None: it does."""
        c = self.config
        if rotated is not None:  # by angle 0 where it does not, because all layers are one compiled function
            cos, sin = tables
            tables = jnp.where(rotated, cos, 1), jnp.where(rotated, sin, 0)
        sizes = {
            "embed": c.hidden_size,
            "heads": c.num_heads,
            "kv_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "mlp": c.intermediate_size,
        }
        weights = {}
        for name, axes in layer_axes(c).items():
            init = _scale if name.endswith("_norm") else _bias if name.endswith("_bias") else _matrix
            weights[name] = weight = self.param(name, init(*axes), [sizes[axis] for axis in axes])
            if init is _matrix:  # heads and head dimension become one axis
                shape = (c.hidden_size, -1) if axes[0] == "embed" else (-1, c.hidden_size)
                weights[name] = weight.astype(self.dtype).reshape(shape)
                if self.has_variable("params", name + LORA_A):
                    a, b = (self.get_variable("params", name + end).astype(self.dtype) for end in (LORA_A, LORA_B))
                    weights |= {name + LORA_A: a.reshape(-1, a.shape[-1]), name + LORA_B: b.reshape(len(b), -1)}
            elif init is _bias:
                weights[name] = weight.astype(self.dtype).reshape(-1)
        return layer(c, weights, x, tables, partial(causal_attention, mask))[0], None


class Unembed(nn.Module):
    """The untied output matrix. A module of its own, so that a trunk without one (a reranker) can run `hidden`."""

    vocab_size: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", _matrix("embed", "vocab"), (hidden.shape[-1], self.vocab_size))
        return logits_of(hidden, kernel.astype(self.dtype), "DV")


class Llama(nn.Module):
    """The language model. `dtype` is the compute dtype; `remat` is "none", "full" or "dots" (see REMAT_POLICIES)."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        c, block = self.config, Block
        self.embed = self.param("embed", _matrix("vocab", "embed"), (c.vocab_size, c.hidden_size))
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype)
        self.final_norm = self.param("final_norm", _scale("embed"), (c.hidden_size,))
        if not c.tie_embeddings:
            self.lm_head = Unembed(c.vocab_size, self.dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens int32[B,T] -> logits float32[B,T,V]. For short inputs: training never builds all logits at once."""
        return self.unembed(self.hidden(tokens))

    def hidden(
        self, tokens: jax.Array, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """tokens int32[B,T] -> hidden dtype[B,T,D] after the final norm; causal, position = index.

        With positions and segments int32[B,T] a row holds several texts one after another: a token sees those before
        it in its own segment.
        """
        tables, mask = causal_inputs(self.config, tokens, positions)
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        x = residual(self.embed[tokens].astype(self.dtype))
        x, _ = self.layers(x, tables, mask, self._rotated())
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps)

    def _rotated(self) -> jax.Array | None:
        """bool[layers]: which layers rotate; None if all do."""
        c = self.config
        return jnp.array([i not in c.unrotated for i in range(c.num_layers)]) if c.unrotated else None

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [...,D] -> logits float32[...,V]; the product is in the compute dtype, summed in float32."""
        hidden = hidden.astype(self.dtype)
        if not self.config.tie_embeddings:
            return self.lm_head(hidden)
        return logits_of(hidden, self.embed.astype(self.dtype), "VD")


@cache
def boxed_shapes(config: LlamaConfig) -> dict[str, Any]:
    """The shapes of a model's parameters with their logical axes; makes no array."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(lambda tokens: Llama(config).init(jax.random.key(0), tokens)["params"], tokens)
