"""The rollout engine: prompts in, completions out. One jitted program prefills a batch and decodes to its end."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.engine.sampling import draw, item_numbers, row_keys
from reft_jax.model.cache import init_cache
from reft_jax.parallel.mesh import put_rows, round_up, row_shards
from reft_jax.types import Completion, Prompt


@partial(jax.jit, static_argnames=("model", "eos_id", "length", "temperature", "top_k"))
def decode_batch(model, lm, tokens, prompt_len, real, keys, max_len, *, eos_id, length, temperature, top_k):
    """Continues each row until EOS or `max_len` tokens in all.

    Args: tokens int32[B,P] right-padded prompts; prompt_len int32[B], each < max_len; real bool[B] (False: a filler
    row, never decoded); keys [B]; max_len int32[]; length, the static size of a cache row, >= max_len. Rows are
    ragged: each writes at its own position, so no row carries padding inside.
    Returns: tokens int32[B,length], logprobs float32[B,length] (at the position of the token), total_len int32[B],
    finished bool[B] (ended with EOS).
    """
    rows, width = tokens.shape
    cache = init_cache(model.config, rows, length, model.dtype)
    hidden, cache = model.apply({"params": lm}, tokens, cache=cache, method="hidden")
    last = jnp.take_along_axis(hidden, (prompt_len - 1)[:, None, None], 1)[:, 0]
    row = jnp.arange(rows)

    def choose(hidden, tokens, logprobs, total_len, done, finished):
        logits = model.apply({"params": lm}, hidden, method="unembed")
        token, logprob = draw(logits, keys, total_len - prompt_len, temperature=temperature, top_k=top_k)
        position = jnp.where(done, length, total_len)
        tokens = tokens.at[row, position].set(token, mode="drop")
        logprobs = logprobs.at[row, position].set(logprob, mode="drop")
        finished = finished | (~done & (token == eos_id))
        total_len = jnp.where(done, total_len, total_len + 1)
        return tokens, logprobs, total_len, done | finished | (total_len >= max_len), finished

    def step(carry):
        cache, tokens, logprobs, total_len, done, finished = carry
        position = (total_len - 1)[:, None]
        token = jnp.take_along_axis(tokens, position, 1)
        hidden, cache = model.apply({"params": lm}, token, position, cache, method="hidden")
        return cache, *choose(hidden[:, 0], tokens, logprobs, total_len, done, finished)

    tokens = jnp.pad(tokens, ((0, 0), (0, length - width)))
    logprobs = jnp.zeros((rows, length), jnp.float32)
    state = choose(last, tokens, logprobs, prompt_len, ~real, jnp.zeros(rows, bool))
    _, tokens, logprobs, total_len, _, finished = jax.lax.while_loop(lambda c: ~c[4].all(), step, (cache, *state))
    return tokens, logprobs, total_len, finished


class Engine:
    """Decodes prompts in batches of `batch` rows, prompts of like length together."""

    def __init__(self, model, mesh, *, batch: int, pad_multiple: int, eos_id: int, seed: int):
        """`batch` must be a multiple of the mesh's row shards; lengths are padded up to `pad_multiple`."""
        self.model, self.mesh, self.batch, self.pad_multiple, self.eos_id = model, mesh, batch, pad_multiple, eos_id
        self.key = jax.random.key(seed)

    def generate(
        self, lm, prompts: list[Prompt], *, max_len: int, temperature: float, top_k: int = 0, iteration: int = 0
    ) -> Iterator[tuple[int, Completion]]:
        """Yields (index of the prompt, its completion) as batches finish.

        Args: lm, the model's parameters; max_len, tokens of prompt and response together (a prompt that fills it
        yields an empty, unfinished completion); temperature 0 is greedy; iteration is part of the sampling key.
        """
        short = [i for i, prompt in enumerate(prompts) if len(prompt.tokens) < max_len]
        for i in set(range(len(prompts))) - set(short):
            empty = np.zeros(0, np.int32)
            yield i, Completion(prompts[i].item_id, prompts[i].sample, empty, empty.astype(np.float32), False)
        order = sorted(short, key=lambda i: len(prompts[i].tokens))
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            completions = self._batch(lm, [prompts[i] for i in chosen], max_len, temperature, top_k, iteration)
            yield from zip(chosen, completions, strict=True)

    def _batch(self, lm, prompts, max_len, temperature, top_k, iteration) -> list[Completion]:
        # Few prompts make a smaller batch: the next power of two, so that few shapes compile.
        rows = min(self.batch, round_up(1 << (len(prompts) - 1).bit_length(), row_shards(self.mesh)))
        filler = [0] * (rows - len(prompts))
        lengths = np.array([len(p.tokens) for p in prompts] + [1] * len(filler), np.int32)
        width = min(round_up(int(lengths.max()), self.pad_multiple), round_up(max_len, self.pad_multiple))
        tokens = np.zeros((rows, width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt.tokens)] = prompt.tokens
        items = np.concatenate([item_numbers(p.item_id for p in prompts), filler]).astype(np.int32)
        samples = np.array([p.sample for p in prompts] + filler, np.int32)
        keys = row_keys(self.key, iteration, items, samples)
        real = np.arange(rows) < len(prompts)
        tokens, lengths_on_device, real = put_rows(self.mesh, (tokens, lengths, real))
        tokens, logprobs, total_len, finished = jax.device_get(
            decode_batch(
                self.model,
                lm,
                tokens,
                lengths_on_device,
                real,
                keys,
                max_len,
                eos_id=self.eos_id,
                length=round_up(max_len, self.pad_multiple),
                temperature=temperature,
                top_k=top_k,
            )
        )
        return [
            Completion(p.item_id, p.sample, tokens[b, start:end], logprobs[b, start:end], bool(finished[b]))
            for b, (p, start, end) in enumerate(zip(prompts, lengths, total_len, strict=False))
        ]
