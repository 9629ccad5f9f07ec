"""Every compiled function of a run, with abstract arrays as arguments; made by the code that the run itself calls.

Each function is described at the largest of its few sizes: all lines full, all slots taken, the cache at its limit.
Nothing here touches a device, so the mesh may consist of devices that do not exist here.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reft_jax.algo.algorithms import make_algorithm
from reft_jax.engine import slots as rollout
from reft_jax.engine.generate import make_engine
from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.llama import Llama
from reft_jax.model.lora import make_lora, trained
from reft_jax.model.rollout_weights import rollout_layer, rollout_rest
from reft_jax.parallel.mesh import ROLLOUT_RULES, abstract_arrays, by_row, on_mesh, round_up, row_shards, with_axes
from reft_jax.plan import flops as cost
from reft_jax.train.iteration import Iteration
from reft_jax.train.packing import Lines, line_size
from reft_jax.train.scoring import decisions_at_once
from reft_jax.train.state import abstract_params, abstract_state, constant_schedule, make_optimizer, state_shardings
from reft_jax.train.steps import RerankBatch, make_step, rerank_loss, sft_loss
from reft_jax.types import PPOBatch

EOS = 2  # any id: the id that ends a row is a constant of the compiled function, and changes nothing else in it


class Jitted(NamedTuple):
    """A compiled function; `shape` describes its arguments in words.

    lower: makes the jax.stages.Lowered, under `on_mesh`. trips: how often its loops of a named scope run (plan/hlo.py).
    once: how many repetitions one call makes (decode steps). calls: repetitions per iteration of PPO. Per repetition:
    flops of the mathematics, summed over devices, and least, the minimum bytes that each device must move. beside: what
    else a device holds in memory during the call (names of `residents`).
    """

    name: str
    shape: str
    lower: Callable[[], Any]
    trips: dict[str, int]
    once: int
    calls: float
    flops: int
    least: int
    beside: tuple[str, ...]


class RunFunctions:
    """`all`: the compiled functions of a run with `config`; `residents`: bytes per device of what stays in memory."""

    def __init__(self, config, model: Llama, mesh):
        self.config, self.model, self.mesh = config, model, mesh
        self.algorithm, rl = make_algorithm(config), config.rl
        head = (ValueHead(), "value_head") if self.algorithm.critic else ()
        self.policy = abstract_params(model, *head)
        self.reranker = abstract_params(model, RerankHead(), "rerank_head")
        self.lora = make_lora(config)
        self.optimizer = make_optimizer(constant_schedule(1e-6, 0), weight_decay=0.0, clip_norm=1.0)
        trains = trained(self.lora, self.policy)
        self.state = abstract_arrays(mesh, abstract_state(self.optimizer, trains))
        self.where = state_shardings(mesh, self.optimizer, trains)
        self.base = frozen(abstract_arrays(mesh, self.policy["lm"]), model.dtype) if self.lora else None
        size = line_size(config, rl.max_len, rl.micro_batch)
        self.iteration = Iteration(model, mesh, self.optimizer, self.algorithm, self.where, self.lora, **size)
        self.engine = make_engine(config, model, mesh, EOS)
        self.params = whole(self.state.params, self.base)
        lm, reference = self.params["lm"], self.base if self.lora else self.params["lm"]
        self.layer = self.abstract(rollout_layer, lm["layers"], 0)
        self.weights = self.abstract(rollout_rest, lm) | {
            f"layers_{i}": self.layer for i in range(model.config.num_layers)
        }
        self.rollout_rows = rl.questions * self.algorithm.samples
        self.ppo_slots, self.sample_slots = self.slots(self.rollout_rows, rl), self.slots(None, config.sample)
        self.prefix = self.prefill_of(config.rl)
        state, policy = device_bytes(self.state), device_bytes(self.state.params)
        # Besides the state: with an adapter its base, which is the reference too, and an argument in training.
        self.second = ("base",) if self.lora else ("reference",)
        self.in_training = () if self.lora else ("reference",)
        self.residents = {
            "policy and moments": state,
            "moments": state - policy,
            self.second[0]: device_bytes(reference) if self.lora or self.algorithm.reference else 0,
            "rollout weights": device_bytes(self.weights),
            "slots": device_bytes(self.ppo_slots),
            "prefix": device_bytes(self.prefix),
        }
        with on_mesh(mesh):
            self.all = list(self.each(reference))

    def each(self, reference) -> Iterator[Jitted]:
        """Every function. reference: the abstract parameters of the reference model."""
        rl, sample = self.config.rl, self.config.sample
        yield self.sft()
        yield self.reshard()
        yield self.prefill()
        yield self.seat()
        yield self.decode("decode, PPO", self.ppo_slots, rl, top_k=0)
        yield self.decode("decode, sampling", self.sample_slots, sample, top_k=sample.top_k)
        yield self.score("score, policy", self.params, ("moments", *self.in_training))
        if self.algorithm.reference:
            yield self.score("score, reference", {"lm": reference}, ("policy and moments",))
        yield self.ppo()
        yield self.rerank()

    # Training

    def lines(self, settings, rows: int) -> tuple[Lines, tuple[int, int, int], int, str]:
        """Lines for `rows` rows, their shape [M,b,T], how many of M hold rows if all are as long as allowed, and that
        in words."""
        size = line_size(self.config, settings.max_len, settings.micro_batch)
        length = round_up(size["max_len"], size["multiple"])
        shape = (rows // settings.micro_batch, settings.micro_batch, length)
        count = -(-rows // (length // settings.max_len * settings.micro_batch))
        return Lines(*[self.rows(shape)] * 4), shape, count, f"{count} × {shape[1]} lines of {length}"

    def rows(self, shape: tuple[int, ...], dtype=jnp.int32, axis: int = 1):
        """An abstract array whose dimension `axis` is spread by row."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row(self.mesh, axis))

    def training(self, name: str, step, state, settings, rows: int, old, **fields) -> Jitted:
        """An update of full lines: the FLOPs of three forward passes, without those of the gradient of frozen weights.
        `old` makes its other input from [M,b,T]."""
        lines, shape, count, words = self.lines(settings, rows)
        batch = (lines, old(shape))
        size = self.model.config, count * shape[1], shape[2]
        forward = (cost.trunk_flops if "rerank_head" in state.params else cost.forward_flops)(*size)
        untrained = forward - cost.attention_flops(*size) if self.lora else 0
        least = 2 * device_bytes(state) + device_bytes((batch, self.base))
        trips = {"micro_batches": count, "decisions": -(-shape[2] // decisions_at_once(*shape[1:]))}
        fields = {"calls": 0, "beside": ()} | fields

        def lower():
            return step.lower(state, batch, count, self.base)

        return Jitted(name, words, lower, trips, 1, flops=3 * forward - untrained, least=least, **fields)

    def sft(self) -> Jitted:
        settings = self.config.sft
        step = make_step(sft_loss, self.model, self.optimizer, self.where, self.lora)
        return self.training(
            "SFT update", step, self.state, settings, settings.batch_size, lambda shape: self.rows(shape, jnp.float32)
        )

    def ppo(self) -> Jitted:
        rl = self.config.rl

        def old(shape):
            each = self.rows(shape, jnp.float32)
            critic = each if self.algorithm.critic else None
            return PPOBatch(each, each, critic, each, critic, each if self.algorithm.penalty("loss") else None)

        calls = {"calls": rl.ppo_epochs * rl.minibatches, "beside": self.in_training}
        rows = self.rollout_rows // rl.minibatches
        return self.training("PPO update", self.iteration.step, self.state, rl, rows, old, **calls)

    def rerank(self) -> Jitted:
        settings = self.config.rerank
        trains = trained(self.lora, self.reranker)
        state = abstract_arrays(self.mesh, abstract_state(self.optimizer, trains))
        where = state_shardings(self.mesh, self.optimizer, trains)
        step = make_step(rerank_loss, self.model, self.optimizer, where, self.lora)

        def judged(shape):
            return RerankBatch(self.rows(shape), self.rows(shape, jnp.float32))

        return self.training("reranker update", step, state, settings, settings.batch_size, judged)

    def score(self, name: str, params, beside: tuple[str, ...]) -> Jitted:
        rl = self.config.rl
        lines, shape, count, words = self.lines(rl, self.rollout_rows)
        return Jitted(
            name,
            words,
            lambda: self.iteration.score_lines.lower(params, lines, count),
            {"micro_batches": count, "decisions": -(-shape[2] // decisions_at_once(*shape[1:]))},
            once=1,
            calls=1,
            flops=cost.forward_flops(self.model.config, count * shape[1], shape[2]),
            least=device_bytes((params, lines)),
            beside=beside,
        )

    # Rollouts

    def abstract(self, made, *args):
        """The abstract result of a function of the model, on the mesh."""
        shapes = jax.eval_shape(lambda *xs: made(self.engine.model, *xs), *args)
        return abstract_arrays(self.mesh, shapes, ROLLOUT_RULES)

    def slots(self, requests: int | None, settings) -> rollout.Slots:
        """Full-length slots for `requests` requests (None: as many as the engine has slots)."""
        shapes = self.engine.shapes(requests or self.config.engine.slots, settings.max_len)
        rows = shapes.slots * row_shards(self.mesh)
        slots = jax.eval_shape(lambda: rollout.empty_slots(self.engine.model, rows, shapes.width, shapes.lengths[-1]))
        return with_axes(self.mesh, slots, rollout.axes(slots), ROLLOUT_RULES)

    def prompts(self, settings):
        """The arguments of a prefill: tokens int32[R,P] and lengths int32[R]."""
        rows = self.engine.shapes(self.rollout_rows, settings.max_len).prefill_rows * row_shards(self.mesh)
        length = round_up(settings.max_prompt, self.config.data.pad_multiple)
        return self.rows((rows, length), axis=0), self.rows((rows,), axis=0)

    def prefill_of(self, settings) -> rollout.Prefix:
        made = jax.eval_shape(
            lambda *xs: rollout.prefill(self.engine.model, *xs), self.weights, *self.prompts(settings)
        )
        return with_axes(self.mesh, made, rollout.axes(made), ROLLOUT_RULES)

    def reshard(self) -> Jitted:
        """One layer's weights from training's form to that of rollouts."""
        layers, count = self.params["lm"]["layers"], self.model.config.num_layers
        return Jitted(
            "rollout weights",
            f"1 of {count} layers",
            lambda: rollout.layer_weights.lower(self.engine.model, layers, 0),
            {},
            once=1,
            calls=count,
            flops=0,
            least=device_bytes(layers) // count + device_bytes(self.layer),
            beside=("moments", *self.in_training, "rollout weights"),
        )

    def prefill(self) -> Jitted:
        prompts = self.prompts(self.config.rl)
        rows, length = prompts[0].shape
        return Jitted(
            "prefill",
            f"{rows} prompts of {length}",
            lambda: rollout.prefill.lower(self.engine.model, self.weights, *prompts),
            {},
            once=1,
            calls=math.ceil(self.config.rl.questions / rows),
            flops=cost.trunk_flops(self.model.config, rows, length),
            least=device_bytes((self.weights, self.prefix)),
            beside=("policy and moments", *self.second, "slots"),
        )

    def seat(self) -> Jitted:
        shapes = self.engine.shapes(self.rollout_rows, self.config.rl.max_len)
        seats = rollout.Seats(*[self.rows((row_shards(self.mesh), shapes.seats), axis=0)] * len(rollout.Seats._fields))
        return Jitted(
            "seat",
            f"{shapes.seats} of {shapes.slots} slots per shard",
            lambda: rollout.seat.lower(self.ppo_slots, self.prefix, seats),
            {},
            once=1,
            calls=math.ceil(self.rollout_rows / row_shards(self.mesh) / shapes.seats),
            flops=0,
            least=2 * device_bytes(self.prefix) * shapes.seats // shapes.prefill_rows,
            beside=("policy and moments", *self.second, "rollout weights"),
        )

    def decode(self, name: str, slots: rollout.Slots, settings, top_k: int) -> Jitted:
        """Counted per decode step; a call makes CHUNK of them."""
        rows, length = slots.tokens.shape
        key = jax.eval_shape(lambda: jax.random.key(0))
        options = {"eos_ids": (EOS,), "temperature": settings.temperature, "top_k": top_k}
        looked_up = 0 if self.model.config.tie_embeddings else device_bytes(self.weights["embed"])
        steps = 0
        if settings is self.config.rl:  # once for each filling of the slots
            steps = (settings.max_len - settings.max_prompt) * math.ceil(self.rollout_rows / rows)
        return Jitted(
            name,
            f"{rows} slots of {length}",
            lambda: rollout.decode.lower(
                self.engine.model, self.weights, slots, key, 0, rollout.CHUNK, rows, **options
            ),
            {"decode_steps": rollout.CHUNK},
            once=rollout.CHUNK,
            calls=steps,
            flops=cost.decode_flops(self.model.config, rows, length),
            least=device_bytes((self.weights, slots.cache)) - looked_up,
            beside=("policy and moments", *self.second, "prefix"),
        )


def frozen(lm, dtype):
    """A language model as the base of an adapter: in the compute dtype."""
    return jax.tree.map(lambda x: x.update(dtype=dtype), lm)


def whole(params, base):
    """`lora.whole` of abstract arrays."""
    if base is None:
        return params
    joined = base | {"layers": base["layers"] | params["lora"]}
    return {"lm": joined} | {name: x for name, x in params.items() if name != "lora"}


def device_bytes(tree) -> int:
    """Bytes per device of a tree of abstract arrays, without the padding of tiles."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize if x.sharding else x.size * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
