"""The device side of a rollout: slots that hold one row each, and the compiled functions that fill, decode, pack them.

Rows are spread over the mesh's row shards, and no function moves a row between shards: the host numbers slots and
prompts within each shard. So none of these functions gathers a cache over the network.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from reft_jax.engine.sampling import draw, row_keys
from reft_jax.model import cache as kv
from reft_jax.model import decode as forward
from reft_jax.model.rollout_weights import rollout_layer, rollout_rest
from reft_jax.parallel.mesh import ROLLOUT_RULES

CHUNK = 16  # decode steps at most before the host looks which rows have ended


class Slots(NamedTuple):
    """One row per slot. A row decodes while total_len < limit; otherwise its slot is free.

    cache: a KVCache per layer, as long as the longest row needs. tokens int32[B,S]; logprobs float32[B,S], at the index
    of the token; total_len, limit int32[B]. item, sample, prompt_len int32[B]: which completion the row is and where
    it begins; its random numbers follow from these.
    """

    cache: tuple[kv.KVCache, ...]
    tokens: jax.Array
    logprobs: jax.Array
    prompt_len: jax.Array
    total_len: jax.Array
    limit: jax.Array
    item: jax.Array
    sample: jax.Array


class Prefix(NamedTuple):
    """Prefilled prompts: per layer a KVCache of P positions (keys in blocks: whole blocks), tokens int32[R,P], length
    int32[R]."""

    cache: tuple[kv.KVCache, ...]
    tokens: jax.Array
    length: jax.Array


class Seats(NamedTuple):
    """Which request gets which slot, int32[D,M] each for D row shards.

    slot, source: the slot, and the row of the Prefix, both within the shard. An unused entry has a slot that does not
    exist.
    """

    slot: jax.Array
    source: jax.Array
    item: jax.Array
    sample: jax.Array
    limit: jax.Array


def axes(tree: Slots | Prefix) -> Slots | Prefix:
    """The logical axes of slots or of a prefix."""
    rows = (PartitionSpec(*("batch", "length")[: x.ndim]) for x in tree[1:])
    return type(tree)(tuple(layer.axes for layer in tree.cache), *rows)


def _placed(tree):
    """The tree with its sharding constraints; without them XLA might choose others."""
    return jax.tree.map(nn.with_logical_constraint, tree, axes(tree))


def _placed_layers(layers: tuple[kv.KVCache, ...], where: kv.KVCache):
    return jax.tree.map(nn.with_logical_constraint, layers, (where,) * len(layers))


on_rollout_rules = nn.logical_axis_rules(ROLLOUT_RULES)  # while a function is traced


@partial(jax.jit, static_argnames="model")
@on_rollout_rules
def layer_weights(model, layers, i):
    """Layer i of the stacked layers, cast or quantized, and laid out for rollouts."""
    return nn.unbox(rollout_layer(model, layers, i))


@partial(jax.jit, static_argnames="model")
@on_rollout_rules
def rest_weights(model, lm):
    """Everything but the layers, the same way."""
    return nn.unbox(rollout_rest(model, lm))


def rollout_weights(model, lm):
    """Make the engine's weights from the parameters as training has them.

    Layer by layer with one small function: a function that makes them all would hold a second copy meanwhile.
    """
    rest = {name: x for name, x in lm.items() if name != "layers"}
    layers = {f"layers_{i}": layer_weights(model, lm["layers"], i) for i in range(model.config.num_layers)}
    return rest_weights(model, rest) | layers


@partial(jax.jit, static_argnames=("model", "rows", "width", "length"))
@on_rollout_rules
def empty_slots(model, rows: int, width: int, length: int) -> Slots:
    """Free slots for rows of at most `width` tokens, with a cache of `length` positions at first."""
    zeros = jnp.zeros(rows, jnp.int32)
    cache = kv.init_cache(model.config, rows, length, model.cache_dtype, blocks=not model.tpu)
    tokens = jnp.zeros((rows, width), jnp.int32)
    return _placed(Slots(cache, tokens, tokens.astype(jnp.float32), zeros + 1, zeros + 1, zeros, zeros, zeros))


@partial(jax.jit, static_argnames="model")
@on_rollout_rules
def prefill(model, weights, tokens, length) -> Prefix:
    """Prefills tokens int32[R,P], padded on the right; length int32[R]: of each prompt.

    The cache of the padding is overwritten before it is read.
    """
    return _placed(Prefix(forward.prefill(model, weights, tokens), tokens, length))


def _by_shard(x, shards: int):
    return x.reshape(shards, x.shape[0] // shards, *x.shape[1:])


@partial(jax.jit, donate_argnums=0)
@on_rollout_rules
def seat(slots: Slots, prefix: Prefix, seats: Seats) -> Slots:
    """Put prompts into free slots, each with its item, sample and limit; one prompt may go into many slots.

    The next decode step reads the prompt's last token once more, so that every token is drawn by `decode`.
    """
    shards = seats.slot.shape[0]

    def put(position_axis, old, new):
        """old [B,…] takes the picked rows of new [R,…], which may be shorter along one axis."""

        def one_shard(old, new, slot, source):
            where = [slot] + [slice(None)] * (old.ndim - 1)
            if position_axis:
                where[position_axis] = slice(new.shape[position_axis])
            return old.at[tuple(where)].set(new[source], mode="drop")

        old_shape = old.shape
        filled = jax.vmap(one_shard)(_by_shard(old, shards), _by_shard(new, shards), seats.slot, seats.source)
        return filled.reshape(old_shape)

    def mark(old, new):
        filled = jax.vmap(lambda o, n, slot: o.at[slot].set(n, mode="drop"))(_by_shard(old, shards), new, seats.slot)
        return filled.reshape(old.shape)

    return _placed(
        slots._replace(
            cache=tuple(
                kv.KVCache(
                    jax.tree.map(partial(put, old.key_axis), old.k, new.k),
                    jax.tree.map(partial(put, 2), old.v, new.v),
                )
                for old, new in zip(slots.cache, prefix.cache, strict=True)
            ),
            tokens=put(1, slots.tokens, prefix.tokens),
            prompt_len=put(None, slots.prompt_len, prefix.length),
            total_len=put(None, slots.total_len, prefix.length),
            limit=mark(slots.limit, seats.limit),
            item=mark(slots.item, seats.item),
            sample=mark(slots.sample, seats.sample),
        )
    )


@jax.jit
@on_rollout_rules
def keep(slots: Slots, kept) -> Slots:
    """Move the rows `kept` int32[D,M] of each shard into fewer slots; for a row that does not exist, a free slot."""
    shards, rows = kept.shape

    def pick(x):
        chosen = jax.vmap(lambda x, kept: x[jnp.minimum(kept, x.shape[0] - 1)])(_by_shard(x, shards), kept)
        return chosen.reshape(shards * rows, *x.shape[1:])

    there = (kept < slots.limit.shape[0] // shards).reshape(-1)
    picked = jax.tree.map(pick, slots)
    return _placed(picked._replace(limit=jnp.where(there, picked.limit, 0)))


@partial(jax.jit, static_argnames="length")
@on_rollout_rules
def grow_layer(layer: kv.KVCache, length: int) -> kv.KVCache:
    """Grow the cache of one layer. Layer by layer, so that only one layer is in memory twice."""
    layer = kv.grow(layer, length)
    return jax.tree.map(nn.with_logical_constraint, layer, layer.axes)


@partial(jax.jit, static_argnames=("model", "eos_ids", "temperature", "top_k"), donate_argnums=2)
@on_rollout_rules
def decode(model, weights, slots: Slots, key, iteration, steps, enough, *, eos_ids, temperature, top_k) -> Slots:
    """Makes up to `steps` (at most CHUNK) steps over all slots; stops when `enough` of the rows that decode have ended.

    Each row draws until one of `eos_ids`, a tuple, or its limit. `steps` must not take a row past the end of the cache.
    On a TPU the cache is written after the last step (model/decode.py).
    """
    index = jnp.arange(slots.tokens.shape[1])[None]
    keys = row_keys(key, iteration, slots.item, slots.sample)
    begun = (slots.total_len < slots.limit).sum()
    begin, cache, slots = slots.total_len - 1, slots.cache, slots._replace(cache=())

    def undecided(carry):
        step, slots, _ = carry
        left = (slots.total_len < slots.limit).sum()
        return (step < steps) & (begun - left < enough) & (left > 0)

    def one_step(carry):
        step, slots, written = carry
        active = slots.total_len < slots.limit
        last = slots.total_len - 1
        token = jnp.take_along_axis(slots.tokens, last[:, None], 1)[:, 0]
        if model.tpu:
            logits, written = forward.step_beside(model, weights, token, begin, step, cache, written)
        else:
            logits, written = forward.step_in_place(model, weights, token, last, written)
        response = slots.total_len - slots.prompt_len
        token, logprob = draw(logits, keys, response, temperature=temperature, top_k=top_k)
        ended = (token[:, None] == jnp.array(eos_ids)[None]).any(1)
        here = active[:, None] & (index == slots.total_len[:, None])
        total_len = jnp.where(active, slots.total_len + 1, slots.total_len)
        slots = slots._replace(
            tokens=jnp.where(here, token[:, None], slots.tokens),
            logprobs=jnp.where(here, logprob[:, None], slots.logprobs),
            total_len=total_len,
            limit=jnp.where(active & ended, total_len, slots.limit),
        )
        return step + 1, slots, _placed_layers(written, where)

    written, where = cache, cache[0].axes
    if model.tpu:
        written = kv.init_recent(model.config, len(begin), CHUNK, model.cache_dtype)
        where = jax.tree.map(lambda _: kv.VALUE_AXES, written[0])
    with jax.named_scope("decode_steps"):
        _, slots, written = jax.lax.while_loop(undecided, one_step, (0, slots, _placed_layers(written, where)))
    if model.tpu:
        drawn = slots.total_len - begin - 1
        written = tuple(kv.join(old, new, begin, drawn) for old, new in zip(cache, written, strict=True))
    return _placed(slots._replace(cache=written))
