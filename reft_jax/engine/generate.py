"""The rollout engine: prompts in, completions out as they finish. Continuous batching over a fixed number of slots.

A prompt is prefilled once for all its samples. A chunk of decode steps runs over all slots and stops early when enough
rows have ended; the next requests take their slots at once. When no request waits any more, the remaining rows move
into fewer slots (halves, quarters, …), so that the last rows do not pay for empty slots. Every shape comes from a short
list: slots in halves, cache lengths in about sixths of the limit, prompt lengths in multiples of `pad_multiple`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from reft_jax.engine import slots as device
from reft_jax.engine.schedule import Group, Schedule, group_prompts
from reft_jax.model import cache as kv
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.rollout_weights import for_rollouts
from reft_jax.parallel.hosts import fetch
from reft_jax.parallel.mesh import put_rows, round_up, row_shards, sizes_up_to
from reft_jax.types import Completion, InputError, Prompt

FEWEST_ROWS = 8  # fewer slots make no step faster: it still reads all weights
PREFILL_ROWS = 8  # prompts per prefill
LENGTHS = 6  # cache lengths up to the limit


def item_number(item_id: str) -> int:
    """The first 31 bits of sha256(item_id): what the random numbers of its rows depend on."""
    return int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:4], "big") >> 1


def quantized(config) -> tuple[str, ...]:
    """Which parts the settings `engine` keep in int8, as `Engine` takes them."""
    return tuple(name for name in ("weights", "cache") if getattr(config.engine, name) == "int8")


def check_cache(config, shapes: LlamaConfig) -> None:
    """InputError if `engine.cache` is int8 and the keys of this model have biases.

    These make a few numbers of each key so large that int8 rounds the others away (docs/performance.md).
    """
    if config.engine.cache == "int8" and shapes.qkv_bias:
        raise InputError(
            f'config: engine.cache="int8" loses too much with a {shapes.model_type} model, whose keys have biases; '
            'leave it empty; engine.weights="int8" works'
        )


class Shapes(NamedTuple):
    """The sizes of a rollout's arrays.

    slots, prefill_rows, seats: per shard, the slots, the rows of a prefill, and how many requests get a slot at once.
    width: positions of a row. lengths: those that the cache may have; the last one may be longer than a row.
    """

    slots: int
    prefill_rows: int
    seats: int
    width: int
    lengths: list[int]


class Engine:
    """Decodes on at most `slots` slots."""

    def __init__(
        self,
        model,
        mesh,
        *,
        slots: int,
        pad_multiple: int,
        eos_id: int | Collection[int],
        seed: int,
        after_chunk: Callable[[], None] = lambda: None,
        int8: tuple[str, ...] = (),
    ):
        """Nothing is compiled here.

        Args:
            slots: a multiple of the mesh's row shards.
            pad_multiple: prompts and rows are padded to a multiple of it; a cache with keys in blocks to whole blocks.
            eos_id: the id that ends a row, or several.
            after_chunk: called after each chunk of decode steps; an exception that it raises ends the rollout.
            int8: which of "weights" and "cache" are quantized. Log-probabilities are those of the quantized model.

        `counts`, since this engine was made: prompts and prompt_tokens prefilled (without padding), decode steps,
        slot_steps (steps times slots), tokens drawn. queue_slot_steps and queue_tokens are the same, counted only while
        requests waited for a slot.
        """
        self.model, self.mesh, self.pad_multiple = for_rollouts(model, mesh, int8), mesh, pad_multiple
        self.eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(sorted(eos_id))
        self.shards = row_shards(mesh)
        self.sizes = [slots // self.shards]  # slots per shard
        while self.sizes[-1] % 2 == 0 and self.sizes[-1] // 2 * self.shards >= FEWEST_ROWS:
            self.sizes.append(self.sizes[-1] // 2)
        self.seed, self.after_chunk = seed, after_chunk
        self.counts: Counter[str] = Counter()

    def shapes(self, requests: int, longest: int) -> Shapes:
        """The sizes of a rollout of `requests` requests; the longest has `longest` tokens with its prompt."""
        wanted = -(-requests // self.shards)
        slots = min((size for size in self.sizes if size >= wanted), default=self.sizes[0])
        width = round_up(longest, self.pad_multiple)
        lengths = sizes_up_to(width, LENGTHS, self.pad_multiple if self.model.tpu else kv.BLOCK)
        return Shapes(slots, min(slots, -(-PREFILL_ROWS // self.shards)), max(1, slots // 8), width, lengths)

    def generate(
        self,
        lm,
        prompts: list[Prompt],
        *,
        max_len: int | Sequence[int],
        temperature: float,
        top_k: int = 0,
        iteration: int = 0,
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the prompt, its completion) as rows end, while the device decodes the next chunk.

        Args:
            lm: the model's parameters as training has them.
            max_len: tokens of prompt and response together, for all prompts or for each. A prompt that fills it yields
                an empty, unfinished completion.
            temperature: 0 is greedy.
            iteration: part of the sampling key.
        """
        limits = np.broadcast_to(np.asarray(max_len, np.int32), len(prompts))
        fits = [i for i, prompt in enumerate(prompts) if len(prompt.tokens) < limits[i]]
        for i in sorted(set(range(len(prompts))) - set(fits)):
            empty = np.zeros(0, np.int32)
            yield i, Completion(prompts[i].item_id, prompts[i].sample, empty, empty.astype(np.float32), False)
        if fits:
            settings = {"eos_ids": self.eos_ids, "temperature": temperature, "top_k": top_k}
            yield from _Rollout(self, lm, prompts, limits, fits, iteration, settings).run()


class _Rollout:
    """One call of `generate`: the slots, and the requests in them."""

    def __init__(self, engine: Engine, lm, prompts, limits, fits: list[int], iteration: int, settings: dict):
        self.engine, self.prompts, self.limits = engine, prompts, limits
        self.key, self.iteration, self.settings = jax.random.key(engine.seed), iteration, settings
        shapes = engine.shapes(len(fits), int(limits.max()))
        self.width, self.lengths, self.seats_at_once = shapes.width, shapes.lengths, shapes.seats
        groups, size = group_prompts(prompts, fits), shapes.slots
        self.schedule = Schedule(groups, shards=engine.shards, slots=size, rows=shapes.prefill_rows)
        self.weights = device.rollout_weights(engine.model, lm)
        self.length = self.lengths[0]  # positions of the cache now
        self.slots = device.empty_slots(engine.model, size * engine.shards, self.width, self.length)
        self.prefixes: dict[int, device.Prefix] = {}

    def run(self) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the prompt, its completion) until no request is left. total_len is int32[D·slots] here."""
        engine, schedule = self.engine, self.schedule
        total_len, ended = np.ones(schedule.owner.size, np.int32), []
        while schedule.queued or schedule.most_taken():
            total_len = self.fill(total_len)
            if not schedule.queued:
                total_len = self.pack(total_len)
            queued = schedule.queued
            longest = int(total_len[schedule.owner.reshape(-1) >= 0].max())
            self.make_room(longest + 1)
            steps = min(device.CHUNK, self.length + 1 - longest)
            enough = self.enough()
            self.slots = device.decode(
                engine.model, self.weights, self.slots, self.key, self.iteration, steps, enough, **self.settings
            )
            yield from ended  # while the device works
            before = total_len
            total_len, limit = fetch((self.slots.total_len, self.slots.limit))
            self.count(total_len - before, schedule.owner.size, queued)
            rows = schedule.leave(total_len < limit)
            ended = list(self.completions(rows, total_len)) if rows else []
            engine.after_chunk()
        yield from ended

    def fill(self, total_len: np.ndarray) -> np.ndarray:
        """Seat the requests that have a free slot. Returns total_len int32[D·slots] with that of the new rows."""
        schedule, total_len = self.schedule, total_len.copy()
        while True:
            if found := schedule.next_seats(self.seats_at_once):
                prefill, taken = found
                shape = (len(taken), self.seats_at_once)
                seats = device.Seats(*(np.zeros(shape, np.int32) for _ in device.Seats._fields))
                seats.slot[:] = schedule.owner.shape[1]  # a slot that does not exist: nobody
                for shard, pairs in enumerate(taken):
                    for place, (slot, seat) in enumerate(pairs):
                        prompt = self.prompts[seat.request]
                        one = (slot, seat.row, item_number(prompt.item_id), prompt.sample, self.limits[seat.request])
                        for field, value in zip(seats, one, strict=True):
                            field[shard, place] = value
                        total_len[shard * schedule.owner.shape[1] + slot] = len(prompt.tokens)
                prefix = self.prefixes[prefill]
                self.make_room(prefix.tokens.shape[1])
                self.slots = device.seat(self.slots, prefix, put_rows(self.engine.mesh, seats))
                if schedule.is_exhausted(prefill):
                    del self.prefixes[prefill]
            elif schedule.needs_prefill():
                number, shares = schedule.next_prefill()
                self.prefixes[number] = self.prefill(shares)
            else:
                return total_len

    def prefill(self, shares: list[list[Group]]) -> device.Prefix:
        """Prefill the prompts of each shard, `rows` rows per shard; rows without a prompt are padding of length 1."""
        engine, rows = self.engine, self.schedule.rows
        longest = max(len(group.tokens) for share in shares for group in share)
        tokens = np.zeros((len(shares) * rows, round_up(longest, engine.pad_multiple)), np.int32)
        length = np.ones(len(tokens), np.int32)
        for shard, share in enumerate(shares):
            for row, group in enumerate(share, shard * rows):
                tokens[row, : len(group.tokens)] = group.tokens
                length[row] = len(group.tokens)
                engine.counts.update(prompts=1, prompt_tokens=len(group.tokens))
        return device.prefill(engine.model, self.weights, *put_rows(engine.mesh, (tokens, length)))

    def make_room(self, positions: int) -> None:
        """Grow the cache to the next length that holds `positions`."""
        length = next(length for length in self.lengths if length >= min(positions, self.width))
        if length > self.length:
            self.length = length
            layers = list(self.slots.cache)
            self.slots = self.slots._replace(cache=())
            for i, layer in enumerate(layers):
                layers[i] = device.grow_layer(layer, length)
            self.slots = self.slots._replace(cache=tuple(layers))

    def enough(self) -> int:
        """How many rows must end before a chunk stops early.

        While requests wait for slots: a sixteenth of the rows. After that: so many that the rest fits into fewer slots.
        With at most FEWEST_ROWS left: one, because its program can then run while the others decode.
        """
        taken = int((self.schedule.owner >= 0).sum())
        if self.schedule.queued:
            return max(1, taken // 16)
        return max(1, taken - (self.next_size() * self.engine.shards or FEWEST_ROWS))

    def next_size(self) -> int:
        """The next smaller number of slots per shard, or 0."""
        return max((size for size in self.engine.sizes if size < self.schedule.owner.shape[1]), default=0)

    def pack(self, total_len: np.ndarray) -> np.ndarray:
        """Move the remaining rows into the fewest slots that hold them. Returns their total_len."""
        taken, size = self.schedule.most_taken(), self.schedule.owner.shape[1]
        smaller = min((size for size in self.engine.sizes if size >= taken), default=size)
        if smaller >= size:
            return total_len
        kept = self.schedule.shrink(smaller)
        self.slots = device.keep(self.slots, put_rows(self.engine.mesh, kept))
        return np.take_along_axis(total_len.reshape(-1, size), np.minimum(kept, size - 1), 1).reshape(-1)

    def count(self, drawn: np.ndarray, slots: int, queued: bool) -> None:
        """Add a chunk to `Engine.counts`. drawn: int32[slots], the tokens that each row drew."""
        steps = int(drawn.max())
        counted = {"slot_steps": slots * steps, "tokens": int(drawn.sum())}
        self.engine.counts.update(steps=steps, **counted)
        if queued:
            self.engine.counts.update({f"queue_{name}": number for name, number in counted.items()})

    def completions(self, rows: list[tuple[int, int]], total_len: np.ndarray) -> Iterator[tuple[int, Completion]]:
        """Fetch the completions of `rows`, (row, request) each, which have ended."""
        tokens, logprobs = fetch((self.slots.tokens, self.slots.logprobs))
        for row, request in rows:
            prompt = self.prompts[request]
            response = slice(len(prompt.tokens), total_len[row])
            finished = bool(tokens[row, total_len[row] - 1] in self.engine.eos_ids)
            drawn = tokens[row, response], logprobs[row, response]
            yield request, Completion(prompt.item_id, prompt.sample, *drawn, finished)


def make_engine(config, model, mesh, end_ids: int | Collection[int], **more) -> Engine:
    """The engine that the settings describe. more: `after_chunk`. Raises InputError as `check_cache` does."""
    check_cache(config, model.config)
    return Engine(
        model,
        mesh,
        slots=config.engine.slots,
        pad_multiple=config.data.pad_multiple,
        eos_id=end_ids,
        seed=config.seed,
        int8=quantized(config),
        **more,
    )
