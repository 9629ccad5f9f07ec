"""Llama in Flax Linen: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Training and scoring scan over the layers, whose weights are stacked: one layer is compiled, and rematerialized.
Rollouts unroll them (`unrolled`, `unstack`): a slice of stacked weights or of a stacked cache would be copied in every
layer of every step, 200 ms instead of 142 for a step of SmolLM2-135M with 64 rows on two CPU cores.

Axes as in `reft_jax.types`. Parameters are kept in the type they were given (float32 at init) and cast to the
compute dtype where they are used; norms, rotations and softmax are float32.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.model.cache import KVCache, write_rows
from reft_jax.model.llama_config import LlamaConfig

QUERY_BLOCK = 256  # positions; half of the scores of a long row are masked, and most of those are never computed
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
    out = _attend(q.reshape(batch, kv_heads, groups * length, head_dim), k, v, mask)
    out = out.reshape(batch, kv_heads, groups, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


@jax.custom_vjp
def _attend(q, k, v, mask):
    """`attend` of q [B,K,G*T,H]. Its gradient is written out because what it costs on a CPU is not its products but
    passes over the scores: two forward and one backward here, and one array of them kept, instead of two."""
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask):
    batch, kv_heads, rows, head_dim = q.shape
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = scores.reshape(batch, kv_heads, -1, *mask.shape[1:])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1).reshape(batch, kv_heads, rows, 1)
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, rows, -1)
    out = jnp.matmul(weights, v, preferred_element_type=jnp.float32) / total
    return out.astype(q.dtype), (q, k, v, weights, total, out)


def _attend_backward(kept, gradient):
    q, k, v, weights, total, out = kept
    gradient = gradient.astype(jnp.float32) / total
    mean = (gradient * out).sum(-1, keepdims=True)
    gradient = gradient.astype(v.dtype)
    to_weights = jnp.matmul(gradient, v.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    to_scores = (weights * (to_weights - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
    to_q, to_k = jnp.matmul(to_scores, k.swapaxes(-1, -2)), jnp.matmul(q.swapaxes(-1, -2), to_scores)
    return to_q, to_k, jnp.matmul(weights.swapaxes(-1, -2), gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` where no position sees a later one (S = T): what no query of a block sees is not computed."""
    length, parts = q.shape[1], []
    for queries in np.array_split(np.arange(length), -(-length // QUERY_BLOCK)):
        block, seen = slice(queries[0], queries[-1] + 1), queries[-1] + 1
        parts.append(attend(q[:, block], k[..., :seen], v[:, :, :seen], mask[:, block, :seen]))
    return jnp.concatenate(parts, axis=1)


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


class Block(nn.Module):
    """One layer, in the form that `nn.scan` takes: (x, shared inputs) -> (x, what is kept of the layer)."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, tables, mask, cache=None, positions=None, keep=False):
        """x dtype[B,T,D], mask bool[1 or B,T,S] -> (x, None), or with `keep` the KVCache of these T positions.

        With a cache and positions int32[B] (T = 1) the row writes there and attends to the cache, which is returned.
        """
        c = self.config

        def weight(name, shape, *axes):
            return self.param(name, _matrix(*axes), shape).astype(self.dtype)

        def norm(name, x):
            scale = self.param(name, _scale("embed"), (c.hidden_size,))
            return rms_norm(x, scale, c.rms_norm_eps)

        def heads_of(name, y, count, axis):
            matrix = weight(name, (c.hidden_size, count, c.head_dim), "embed", axis, "head_dim")
            return project(y, matrix.reshape(c.hidden_size, -1)).reshape(*y.shape[:2], count, c.head_dim)

        y = norm("attention_norm", x)
        q = rotate(heads_of("q", y, c.num_heads, "heads"), tables)
        k = rotate(heads_of("k", y, c.num_kv_heads, "kv_heads"), tables)
        v = heads_of("v", y, c.num_kv_heads, "kv_heads")
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)

        if cache is None:
            heads = attend_causally(q, k, v, mask)
            cache = KVCache(k, v) if keep else None
        else:
            cache = write_rows(cache, positions, k[:, :, :, 0], v[:, :, 0])
            heads = attend(q, *cache, mask)
        o_weight = weight("o", (c.num_heads, c.head_dim, c.hidden_size), "heads", "head_dim", "embed")
        x = _residual(x + project(heads.reshape(*x.shape[:2], -1), o_weight.reshape(-1, c.hidden_size)))

        y = norm("mlp_norm", x)
        gate = project(y, weight("gate", (c.hidden_size, c.intermediate_size), "embed", "mlp"))
        up = project(y, weight("up", (c.hidden_size, c.intermediate_size), "embed", "mlp"))
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", "length", "mlp"))
        x = _residual(x + project(y, weight("down", (c.intermediate_size, c.hidden_size), "mlp", "embed")))
        return x, cache


class Unembed(nn.Module):
    """The untied output matrix. A module of its own, so that a trunk without one (a reranker) can run `hidden`."""

    vocab_size: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", _matrix("embed", "vocab"), (hidden.shape[-1], self.vocab_size))
        return jnp.einsum("...D,DV->...V", hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32)


class Llama(nn.Module):
    """The language model. `dtype` is the compute dtype; `remat` is "none", "full" or "dots" (see REMAT_POLICIES).

    `unrolled`: the layers' parameters are `unstack`ed; what rollouts run.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    unrolled: bool = False

    def setup(self):
        c = self.config
        self.embed = self.param("embed", _matrix("vocab", "embed"), (c.vocab_size, c.hidden_size))
        if self.unrolled:
            self.layers = [Block(c, self.dtype) for _ in range(c.num_layers)]
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
        tables, mask = self._causal(tokens, positions)
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        x, _ = self.layers(self._embed(tokens), tables, mask)
        return self._norm(x)

    def prefill(self, tokens: jax.Array) -> tuple[KVCache, ...]:
        """tokens int32[B,P] -> the cache of these positions, layer by layer (unrolled only)."""
        tables, mask = self._causal(tokens, None)
        x, cache = self._embed(tokens), []
        for layer in self.layers:
            x, kept = layer(x, tables, mask, keep=True)
            cache.append(kept)
        return tuple(cache)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, cache: tuple[KVCache, ...]
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """One token a row: tokens, positions int32[B] -> (hidden dtype[B,D], the cache written to) (unrolled only).

        Each row writes at its own position (one outside the cache is not written) and sees positions up to it.
        """
        mask = jnp.arange(cache[0].k.shape[-1])[None, None, :] <= positions[:, None, None]
        tables = rope_tables(self.config, positions[:, None])
        x, written = self._embed(tokens[:, None]), []
        for layer, old in zip(self.layers, cache, strict=True):
            x, new = layer(x, tables, mask, old, positions)
            written.append(new)
        return self._norm(x)[:, 0], tuple(written)

    def _causal(self, tokens, positions):
        index = jnp.arange(tokens.shape[1])
        tables = rope_tables(self.config, index[None] if positions is None else positions)
        return tables, (index[:, None] >= index[None, :])[None]

    def _embed(self, tokens):
        return _residual(self.embed[tokens].astype(self.dtype))

    def _norm(self, x):
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [...,D] -> logits float32[...,V]; the product is in the compute dtype, summed in float32."""
        hidden = hidden.astype(self.dtype)
        if not self.config.tie_embeddings:
            return self.lm_head(hidden)
        embed = self.embed.astype(self.dtype)
        return jnp.einsum("...D,VD->...V", hidden, embed, preferred_element_type=jnp.float32)


def unstack(lm, dtype):
    """Parameters of a Llama, in the form and compute dtype that its `unrolled` clone takes."""
    lm = jax.tree.map(lambda x: x.astype(dtype), lm)
    count = len(jax.tree.leaves(lm["layers"])[0])
    layers = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], lm["layers"]) for i in range(count)}
    return {name: leaf for name, leaf in lm.items() if name != "layers"} | layers
