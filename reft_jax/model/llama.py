"""Llama in Flax Linen: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Training and scoring scan over the layers, whose weights are stacked: one layer is compiled, and rematerialized.
Rollouts unroll them (`unrolled`, rollout_weights.py): a slice of stacked weights or of a stacked cache would be copied
in every layer of every step, 200 ms instead of 142 for a step of SmolLM2-135M with 64 rows on two CPU cores.

Axes as in `reft_jax.types`. Parameters are kept in the type they were given (float32 at init) and cast to the
compute dtype where they are used; norms, rotations and softmax are float32.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.model.attention import attend, attend_causally
from reft_jax.model.cache import KVCache, beside, in_blocks, in_place
from reft_jax.model.llama_config import LlamaConfig

# What the backward pass keeps of a layer's forward pass. "dots": the results of matrix products with weights.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
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


def rotate_columns(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The same of x [heads,H,B], by (cos, cos) and (-sin, sin) float32[1,H,B]: on a CPU 1 to 2 % of a decode step less
    than in halves. A TPU would be slower so; it has no columns."""
    cos, sin = tables
    y = x.astype(jnp.float32)
    return (y * cos + jnp.roll(y, y.shape[1] // 2, axis=1) * sin).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, axis: int = -1) -> jax.Array:
    """x over its root mean square along its axis D, times scale [D]; float32 inside, x's dtype outside."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis, keepdims=True) + eps)
    along = np.delete(np.arange(x.ndim), axis)
    return (y * jnp.expand_dims(scale.astype(jnp.float32), along)).astype(x.dtype)


@jax.custom_vjp
def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [B,T,D] times weight [D,F] -> [B,T,F], in x's dtype."""
    return x @ weight


def _project_forward(x, weight):
    return x @ weight, (x, weight)


def _project_backward(kept, y):
    # Rows as one axis, behind a barrier: else XLA's CPU backend fuses the transposes that the weight's gradient needs
    # into what made x and y, which writes them column by column.
    x, weight = kept
    rows, outs = jax.lax.optimization_barrier((x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])))
    return y @ weight.T, rows.T @ outs


project.defvjp(_project_forward, _project_backward)


def _matrix(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)


def _scale(*axes: str):
    return nn.with_logical_partitioning(nn.initializers.ones, axes)


def _residual(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))


def _residual_column(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, ("act_embed", "batch"))


class Block(nn.Module):
    """One layer, in the form that `nn.scan` takes: (x, shared inputs) -> (x, what is kept of the layer).

    `form` of the matrices: "" as training has them. In rollouts heads and head dimension are one axis. "left": every
    matrix is [out, in]. "tpu": the model axis is the last of all; a TPU would copy weights of another form into this
    one before it decodes.
    """

    config: LlamaConfig
    dtype: Any
    form: str = ""

    @nn.compact
    def __call__(self, x, tables, mask, past=None, keep=False):
        """x dtype[B,T,D], mask bool[1 or B,T,T] -> (x, None), or with `keep` the KVCache of these T positions.

        In decoding (T = 1, no mask) `past(k, v)` of this position, [B,K,H] both, returns (what there is to attend to,
        what is kept). With form "left" x, tables and result are then columns (`_column`).
        """
        if past is not None and self.form == "left":
            return self._column(x, tables, past)
        c = self.config

        def into(name, y, size, axis):
            if not self.form:
                return project(y, self._weight(name, (c.hidden_size, size), "embed", axis))
            return project(y, self._weight(name, (size, c.hidden_size), axis, "embed").T)

        def out_of(name, y, axis):
            if self.form == "left":
                return project(y, self._weight(name, (c.hidden_size, y.shape[-1]), "embed", axis).T)
            return project(y, self._weight(name, (y.shape[-1], c.hidden_size), axis, "embed"))

        def heads_of(name, y, count, axis):
            if self.form:
                out = into(name, y, count * c.head_dim, axis)
            else:
                matrix = self._weight(name, (c.hidden_size, count, c.head_dim), "embed", axis, "head_dim")
                out = project(y, matrix.reshape(c.hidden_size, -1))
            return out.reshape(*y.shape[:2], count, c.head_dim)

        y = self._norm("attention_norm", x)
        q = rotate(heads_of("q", y, c.num_heads, "heads"), tables)
        k = rotate(heads_of("k", y, c.num_kv_heads, "kv_heads"), tables)
        v = heads_of("v", y, c.num_kv_heads, "kv_heads")

        if past is None:
            k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
            heads = attend_causally(q, k, v, mask)
            kept = KVCache(k, v) if keep else None
        else:
            parts, kept = past(k[:, 0], v[:, 0])
            heads = attend(q[:, 0], *parts)
        heads = heads.reshape(*x.shape[:2], -1)
        if self.form:
            out = out_of("o", heads, "heads")
        else:
            matrix = self._weight("o", (c.num_heads, c.head_dim, c.hidden_size), "heads", "head_dim", "embed")
            out = project(heads, matrix.reshape(-1, c.hidden_size))
        x = _residual(x + out)

        y = self._norm("mlp_norm", x)
        gate, up = (into(name, y, c.intermediate_size, "mlp") for name in ("gate", "up"))
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", "length", "mlp"))
        return _residual(x + out_of("down", y, "mlp")), kept

    def _column(self, x, tables, past):
        """The same of one position a row, each of them a column: x dtype[D,B], tables float32[1,H,B].

        So the weights stand on the left of each product: on a CPU, 64 rows of SmolLM2 take 0.8 of the time, and nothing
        is transposed but queries, keys and values for the attention.
        """
        c, batch = self.config, x.shape[1]

        def into(name, y, size, axis):
            return self._weight(name, (size, c.hidden_size), axis, "embed") @ y

        def out_of(name, y, axis):
            return self._weight(name, (c.hidden_size, y.shape[0]), "embed", axis) @ y

        def heads_of(name, y, count, axis):
            return into(name, y, count * c.head_dim, axis).reshape(count, c.head_dim, batch)

        y = self._norm("attention_norm", x, axis=0)
        q = rotate_columns(heads_of("q", y, c.num_heads, "heads"), tables)
        k = rotate_columns(heads_of("k", y, c.num_kv_heads, "kv_heads"), tables)
        v = heads_of("v", y, c.num_kv_heads, "kv_heads")
        parts, kept = past(k.transpose(2, 0, 1), v.transpose(2, 0, 1))
        heads = attend(q.transpose(2, 0, 1), *parts)
        x = _residual_column(x + out_of("o", heads.reshape(batch, -1).T, "heads"))

        y = self._norm("mlp_norm", x, axis=0)
        gate, up = (into(name, y, c.intermediate_size, "mlp") for name in ("gate", "up"))
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("mlp", "batch"))
        return _residual_column(x + out_of("down", y, "mlp")), kept

    def _weight(self, name, shape, *axes):
        return self.param(name, _matrix(*axes), shape).astype(self.dtype)

    def _norm(self, name, x, axis=-1):
        scale = self.param(name, _scale("embed"), (self.config.hidden_size,))
        return rms_norm(x, scale, self.config.rms_norm_eps, axis)


class Unembed(nn.Module):
    """The untied output matrix. A module of its own, so that a trunk without one (a reranker) can run `hidden`. With
    form "left" it is [V,D], and hidden and logits are columns."""

    vocab_size: int
    dtype: Any
    form: str = ""

    @nn.compact
    def __call__(self, hidden):
        if self.form == "left":
            kernel = self.param("kernel", _matrix("vocab", "embed"), (self.vocab_size, hidden.shape[0]))
            return _logits_column(kernel.astype(self.dtype), hidden)
        kernel = self.param("kernel", _matrix("embed", "vocab"), (hidden.shape[-1], self.vocab_size))
        return jnp.einsum("...D,DV->...V", hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32)


def _logits_column(kernel, hidden):
    return jnp.matmul(kernel, hidden, preferred_element_type=jnp.float32)


class Llama(nn.Module):
    """The language model. `dtype` is the compute dtype; `remat` is "none", "full" or "dots" (see REMAT_POLICIES).

    `unrolled`: the layers' parameters are those of rollout_weights.py; what rollouts run. `tpu`: with weights and cache
    in the forms that a TPU wants.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    unrolled: bool = False
    tpu: bool = False

    def setup(self):
        c, form = self.config, ""
        self.embed = self.param("embed", _matrix("vocab", "embed"), (c.vocab_size, c.hidden_size))
        if self.unrolled:
            form = "tpu" if self.tpu else "left"
            self.layers = [Block(c, self.dtype, form) for _ in range(c.num_layers)]
        else:
            block = Block
            if self.remat != "none":
                block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, self.dtype)
        self.final_norm = self.param("final_norm", _scale("embed"), (c.hidden_size,))
        if not c.tie_embeddings:
            self.lm_head = Unembed(c.vocab_size, self.dtype, form)

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
        tables, mask = self._causal(tokens, positions)
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        x, _ = self.layers(self._embed(tokens), tables, mask)
        return self._norm(x)

    def prefill(self, tokens: jax.Array) -> tuple[KVCache, ...]:
        """tokens int32[B,P] -> the cache of these positions, layer by layer, its keys in blocks but for a TPU (unrolled
        only)."""
        tables, mask = self._causal(tokens, None)
        x, cache = self._embed(tokens), []
        for layer in self.layers:
            x, kept = layer(x, tables, mask, keep=True)
            cache.append(kept if self.tpu else in_blocks(kept))
        return tuple(cache)

    def decode(self, tokens: jax.Array, at: jax.Array, cache: tuple[KVCache, ...]):
        """One token a row: tokens int32[B] at the positions at int32[B] -> (logits float32[V,B], the cache with them)
        (unrolled only). A row sees the positions of the cache up to its own."""
        seen = jnp.arange(cache[0].length)[None] <= at[:, None]
        cos, sin = (table[:, 0].transpose(1, 2, 0) for table in rope_tables(self.config, at[:, None]))
        tables = jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
        x, written = _residual_column(self.embed[tokens].astype(self.dtype).T), []
        for layer, its_cache in zip(self.layers, cache, strict=True):
            x, its_cache = layer(x, tables, None, partial(in_place, its_cache, at, seen))
            written.append(its_cache)
        hidden = rms_norm(x, self.final_norm, self.config.rms_norm_eps, axis=0)
        if self.config.tie_embeddings:
            return _logits_column(self.embed.astype(self.dtype), hidden), tuple(written)
        return self.lm_head(hidden), tuple(written)

    def decode_beside(
        self,
        tokens: jax.Array,
        begin: jax.Array,
        step: jax.Array,
        cache: tuple[KVCache, ...],
        recent: tuple[KVCache, ...],
    ):
        """`decode` that leaves the cache alone: returns `recent` with this step (unrolled, for a TPU only).

        A row sees the first begin int32[B] positions of the cache and then what the steps 0 … step int32[] added.
        """
        old = jnp.arange(cache[0].length)[None] < begin[:, None]
        new = (jnp.arange(recent[0].length) <= step)[None]
        tables, x, written = rope_tables(self.config, (begin + step)[:, None]), self._embed(tokens[:, None]), []
        for layer, *both in zip(self.layers, cache, recent, strict=True):
            x, its_recent = layer(x, tables, None, partial(beside, *both, step, old, new))
            written.append(its_recent)
        return self.unembed(self._norm(x)[:, 0]).T, tuple(written)

    def _causal(self, tokens, positions):
        index = jnp.arange(tokens.shape[1])
        tables = rope_tables(self.config, index[None] if positions is None else positions)
        return tables, (index[:, None] >= index[None, :])[None]

    def _embed(self, tokens):
        return _residual(self.embed[tokens].astype(self.dtype))

    def _norm(self, x):
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [...,D] -> logits float32[...,V]; the product is in the compute dtype, summed in float32. Not with
        rollout weights but a TPU's: there `decode` has hidden states and logits as columns."""
        hidden = hidden.astype(self.dtype)
        if not self.config.tie_embeddings:
            return self.lm_head(hidden)
        embed = self.embed.astype(self.dtype)
        return jnp.einsum("...D,VD->...V", hidden, embed, preferred_element_type=jnp.float32)
