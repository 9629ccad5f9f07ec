"""Prefill and one decode step, as plain functions of the rollout weights (rollout_weights.py).

A step has two forms, because CPUs and TPUs need different layouts of the same arrays. Both unroll the layers. A matrix
product cannot read a slice of a larger array in place: with stacked weights and a stacked cache, each layer would copy
its slice of both in every step (SmolLM2-135M, 64 rows, two CPU cores: 200 ms per step; unrolled 142).

`step_in_place`, off TPUs: the rows of the batch are the columns of x [D,B]. Each weight matrix [out, in] is then the
left factor of its product. Only queries, keys and values are transposed, for the attention. Each row writes its key and
value into the cache, at its own position.

`step_beside`, on a TPU. There such a write is a scatter, and the TPU compiler would copy the whole cache into another
layout before the steps and back after them: a second cache in memory, and per step a quarter of its bytes more to move.
So up to 16 steps write to a second, small array, all rows at the same place, and `cache.join` then adds it to the
cache. On a CPU that is slower: attention to two parts takes 31 ms of a step of 94 ms, to one part 23 ms. Here the rows
of the batch are the rows of x: 64 columns would fill only half of a TPU's register.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from reft_jax.model.attention import attend, attend_parts
from reft_jax.model.cache import KVCache, in_blocks, write, write_recent
from reft_jax.model.llama import causal_attention, causal_inputs, layer, product, residual, rms_norm, rope_tables
from reft_jax.model.rollout_weights import RolloutModel

Cache = tuple[KVCache, ...]  # layer by layer


def prefill(model: RolloutModel, weights, tokens: jax.Array) -> Cache:
    """The cache after reading tokens int32[B,P]; its keys are in blocks, except on a TPU."""
    tables, mask = causal_inputs(model.config, tokens)
    x, cache = residual(weights["embed"][tokens]), []
    for i, own in enumerate(_layers(model, weights)):
        own_tables = None if i in model.config.unrotated else tables
        x, kept = layer(model.config, _inputs_first(model, own), x, own_tables, partial(causal_attention, mask))
        cache.append(kept if model.tpu else in_blocks(kept))
    return tuple(cache)


def step_in_place(model: RolloutModel, weights, tokens: jax.Array, at: jax.Array, cache: Cache):
    """One token per row: tokens int32[B] at positions at int32[B] -> (logits float32[V,B], the cache with them).

    A row sees the positions of the cache up to its own. Not for a TPU.
    """
    c, batch, written = model.config, len(tokens), []
    seen = jnp.arange(cache[0].length)[None] <= at[:, None]
    cos, sin = (table[:, 0].transpose(1, 2, 0) for table in rope_tables(c, at[:, None]))  # float32[1,H/2,B]
    tables = jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
    x = _residual_columns(weights["embed"][tokens].T)
    for i, (own, positions) in enumerate(zip(_layers(model, weights), cache, strict=True)):
        y = rms_norm(x, own["attention_norm"], c.rms_norm_eps, axis=0)
        q, k, v = (_linear_columns(own, name, y).reshape(-1, c.head_dim, batch) for name in "qkv")
        if c.qk_norm:
            q, k = (rms_norm(z, own[name], c.rms_norm_eps, axis=1) for z, name in ((q, "q_norm"), (k, "k_norm")))
        if i not in c.unrotated:
            q, k = _rotate_columns(q, tables), _rotate_columns(k, tables)
        q, k, v = (z.transpose(2, 0, 1) for z in (q, k, v))
        positions = write(positions, at, k, v)
        written.append(positions)
        heads = attend(q, *positions, seen).reshape(batch, -1).T
        x = _residual_columns(x + _linear_columns(own, "o", heads))

        y = rms_norm(x, own["mlp_norm"], c.rms_norm_eps, axis=0)
        y = nn.silu(_linear_columns(own, "gate", y)) * _linear_columns(own, "up", y)
        y = nn.with_logical_constraint(y, ("mlp", "batch"))
        x = _residual_columns(x + _linear_columns(own, "down", y))
    hidden = rms_norm(x, weights["final_norm"], c.rms_norm_eps, axis=0)
    output = weights["embed"] if c.tie_embeddings else weights["lm_head"]["kernel"]
    return jnp.matmul(output, hidden, preferred_element_type=jnp.float32), tuple(written)


def step_beside(
    model: RolloutModel, weights, tokens: jax.Array, begin: jax.Array, step: jax.Array, cache: Cache, recent: Cache
):
    """The same for a TPU, which only reads the cache: -> (logits float32[V,B], `recent` with this step int32[]).

    A row sees the first begin int32[B] positions of the cache, then what the steps 0 … step added to `recent`.
    """
    c, written = model.config, []
    old = jnp.arange(cache[0].length)[None] < begin[:, None]
    new = (jnp.arange(recent[0].length) <= step)[None]

    def attention(positions, added, q, k, v):
        added = write_recent(added, step, k[:, 0], v[:, 0])
        return attend_parts(q[:, 0], (*positions, old), (added.k.swapaxes(2, 3), added.v, new))[:, None], added

    tables, x = rope_tables(c, (begin + step)[:, None]), residual(weights["embed"][tokens[:, None]])
    for i, (own, *both) in enumerate(zip(_layers(model, weights), cache, recent, strict=True)):
        own_tables = None if i in c.unrotated else tables
        x, added = layer(c, _inputs_first(model, own), x, own_tables, partial(attention, *both))
        written.append(added)
    hidden = rms_norm(x, weights["final_norm"], c.rms_norm_eps)[:, 0]
    output = weights["embed"].T if c.tie_embeddings else weights["lm_head"]["kernel"]
    return jnp.matmul(hidden, output, preferred_element_type=jnp.float32).T, tuple(written)


def _layers(model: RolloutModel, weights) -> list[dict[str, jax.Array]]:
    return [weights[f"layers_{i}"] for i in range(model.config.num_layers)]


def _inputs_first(model: RolloutModel, own: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A layer's weights with every matrix [in, out]; the compiler makes the transposes part of the products."""
    turned = ("q", "k", "v", "gate", "up") if model.tpu else ("q", "k", "v", "o", "gate", "up", "down")
    return own | {name: own[name].T for name in turned}


def _linear_columns(own: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """`llama.linear` of x [D,B], with matrices [F,D] -> [F,B]."""
    y, bias = product(own[name], x), own.get(f"{name}_bias")
    return y if bias is None else y + bias[:, None]


def _residual_columns(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, ("act_embed", "batch"))


def _rotate_columns(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [heads,H,B] by (cos, cos) and (-sin, sin) float32[1,H,B].

    On a CPU a step takes 1 to 2 % less time than with `llama.rotate`, which splits x into halves.
    """
    cos, sin = tables
    y = x.astype(jnp.float32)
    return (y * cos + jnp.roll(y, y.shape[1] // 2, axis=1) * sin).astype(x.dtype)
