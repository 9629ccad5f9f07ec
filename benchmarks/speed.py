"""Compare rollouts, scoring and updates with transformers on PyTorch, and with the machine's limits.

    python benchmarks/speed.py --model=DIR --workload=FILE --peer=FILE [--only=sample,decode,score,update,rows]

The peer is a script that does the same work (`peer_torch.py sample|score|update …`) and prints one JSON line with
tok_s. The workload is a JSON file with `prompts` (ids) and `lengths`, the number of tokens of every completion, so that
both sides do the same work. These tokens are the "useful" ones; padding does not count. Each pair runs --rounds times
in turns, and the median counts. Prints every row and rewrites the table in benchmarks/README.md. Needs a quiet machine.
On a CPU set GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as launch/ does.
"""

import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from machine import limits, report

from reft_jax.algo.algorithms import PPO
from reft_jax.engine import slots as device
from reft_jax.engine.generate import Engine
from reft_jax.model.heads import ValueHead
from reft_jax.model.hf import load_hf
from reft_jax.model.rollout_weights import for_rollouts
from reft_jax.parallel.compilation import compiles
from reft_jax.parallel.mesh import make_mesh, on_mesh
from reft_jax.train.packing import Packing
from reft_jax.train.scoring import make_scorer
from reft_jax.train.state import abstract_params, make_optimizer, new_state, state_shardings
from reft_jax.train.steps import make_step, rl_loss
from reft_jax.types import PPOBatch, Prompt

STEPS, BEGIN = 16, 208  # of a measured decode: its steps, and the positions before them
FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "folder in Hugging Face format", required=True)
flags.DEFINE_string("workload", None, "JSON file with prompts and lengths", required=True)
flags.DEFINE_string("peer", None, "script of the other side; without it only ours runs")
flags.DEFINE_string("peer_python", sys.executable, "the Python that runs it, with its own packages")
flags.DEFINE_string("peer_model", None, "its folder of the same model, if in another format")
flags.DEFINE_list("only", ["sample", "decode", "score", "update", "rows"], "which rows of the table")
flags.DEFINE_integer("slots", 64, "slots of our engine")
flags.DEFINE_integer("rounds", 1, "how often each pair runs", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute dtype of both sides")
flags.DEFINE_string("remat", "none", "model.remat of our updates")
flags.DEFINE_integer("micro_batch", 3, "lines per micro-batch of our packed update")
flags.DEFINE_bool("write", True, "rewrite the table in benchmarks/README.md")


def peer(*arguments: str) -> float:
    """Useful tokens per second of the other side."""
    model = FLAGS.peer_model or FLAGS.model
    command = [FLAGS.peer_python, FLAGS.peer, *arguments, "--model", model, "--dtype", FLAGS.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["tok_s"]


def compared(name: str, ours, *theirs: str) -> str:
    """A row of the table; `ours()` returns useful tokens per second."""
    own, others = [], []
    for _ in range(FLAGS.rounds):
        if FLAGS.peer:
            others.append(peer(*theirs))
        own.append(ours())
    own = statistics.median(own)
    if not others:
        return f"| {name} | | {own:.0f} | |"
    other = statistics.median(others)
    return f"| {name} | {other:.0f} | {own:.0f} | {own / other:.2f}× |"


class Ours:
    """Our side of the comparison: one model on one mesh."""

    def __init__(self):
        self.mesh = make_mesh(-1, 1, 1)
        self.model, self.lm = load_hf(FLAGS.model)
        self.model = self.model.clone(dtype=jnp.dtype(FLAGS.dtype), remat=FLAGS.remat)
        work = json.loads(Path(FLAGS.workload).read_text())
        pairs = [(i, k) for i, row in enumerate(work["lengths"]) for k in row]
        self.prompts = [np.array(prompt, np.int32) for prompt in work["prompts"]]
        self.jobs = [(self.prompts[i], k) for i, k in pairs]
        self.requests = [Prompt(f"gsm8k_{i}", n, self.prompts[i]) for n, (i, _) in enumerate(pairs)]

    def engine(self) -> Engine:
        return Engine(self.model, self.mesh, slots=FLAGS.slots, pad_multiple=32, eos_id=-1, seed=0)

    def sample(self) -> float:
        engine, limit = self.engine(), [len(prompt) + k for prompt, k in self.jobs]
        tokens = sum(k for _, k in self.jobs)
        list(engine.generate(self.lm, self.requests, max_len=limit, temperature=1.0))  # compiles
        engine.counts.clear()
        compiled, begun = compiles(), time.perf_counter()
        found = dict(engine.generate(self.lm, self.requests, max_len=limit, temperature=1.0))
        took, counts = time.perf_counter() - begun, engine.counts
        assert sum(len(completion.tokens) for completion in found.values()) == tokens
        busy = counts["queue_tokens"] / max(1, counts["queue_slot_steps"])
        print(
            f"  {tokens} tokens, {counts['steps']} steps; slots busy {busy:.1%} while requests wait, "
            f"{counts['tokens'] / counts['slot_steps']:.1%} in all; {counts['prompt_tokens']} prompt tokens prefilled "
            f"of {sum(map(len, self.prompts))} in {len(self.prompts)} prompts; {compiles() - compiled} compiles",
            flush=True,
        )
        return tokens / took

    def decode_step(self, times: int) -> dict[str, float]:
        """Seconds: the median of one decode step with all slots full, its limits, and the first call with its compile.

        The limits are those of this machine, measured between the calls, of which there are `times`.
        """
        slots, steps, begin, length = FLAGS.slots, STEPS, BEGIN, 256
        model, zeros = for_rollouts(self.model, self.mesh), np.zeros(slots, np.int32)
        weights = device.rollout_weights(model, self.lm)
        state = device.empty_slots(model, slots, length, length)
        settings = {"eos_ids": (-1,), "temperature": 1.0, "top_k": 0}
        taken, rates = [], []
        for i in range(times):
            if i % 3 == 1:  # in turns, so that other work on the machine slows both
                rates.append(limits(FLAGS.dtype))
            state = state._replace(total_len=jnp.asarray(zeros + begin), limit=jnp.asarray(zeros + length))
            begun = time.perf_counter()
            state = device.decode(model, weights, state, jax.random.key(0), 0, steps, slots, **settings)
            state.total_len.block_until_ready()
            taken.append(time.perf_counter() - begun)
        flops, copied = (statistics.median(rate) for rate in zip(*rates, strict=True))
        size = jnp.dtype(FLAGS.dtype).itemsize
        parameters = sum(x.size for x in jax.tree.leaves(self.lm))
        config = self.model.config
        live = 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots * (begin + steps / 2) * size
        by_flops, by_bytes = 2 * parameters * slots / flops, (parameters * size + live) / copied
        print(
            f"  limit {1e3 * by_flops:.3g} ms by FLOPs ({flops / 1e9:.0f} GFLOP/s), {1e3 * by_bytes:.3g} ms by bytes "
            f"({copied / 1e9:.1f} GB/s)",
            flush=True,
        )
        step = statistics.median(taken[1:]) / steps
        return {"step": step, "by_flops": by_flops, "by_bytes": by_bytes, "first": taken[0]}

    def decode(self) -> str:
        """A row of the table: one decode step, compared with the machine's limits."""
        found = self.decode_step(16)
        step, limit = found["step"], max(found["by_flops"], found["by_bytes"])
        name = f"decode step, {FLAGS.slots} full slots, {BEGIN} to {BEGIN + STEPS} positions: ms (left: the limit)"
        return f"| {name} | {1e3 * limit:.0f} | {1e3 * step:.0f} | {limit / step:.0%} |"

    def pack(self, rows, prompt_lens, max_len: int, micro_batch: int) -> Packing:
        lengths = np.array([len(row) for row in rows])
        size = {"micro_batch": micro_batch, "micro_batches": -(-len(rows) // micro_batch), "multiple": 64}
        return Packing(rows, np.array(prompt_lens) - 1, lengths - prompt_lens, max_len=max_len, **size)

    def random_rows(self, lengths) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [rng.integers(5, self.model.config.vocab_size, length) for length in lengths]

    def score_times(self) -> list[float]:
        """Seconds of scoring 16 rows of 256 tokens, four times; the first with its compile."""
        packing = self.pack(self.random_rows([256] * 16), [1] * 16, 256, 8)
        score, taken = make_scorer(self.model, 1.0), []
        for _ in range(4):
            begun = time.perf_counter()
            jax.block_until_ready(score({"lm": self.lm}, packing.lines, packing.count))
            taken.append(time.perf_counter() - begun)
        return taken

    def score(self) -> float:
        return 16 * 256 / statistics.median(self.score_times()[1:])

    def taken_over(self) -> dict:
        """The weights for an update, which takes them over: here a copy."""
        return jax.tree.map(jnp.copy, self.lm)

    def update_times(self, rows: bool) -> tuple[int, list[float]]:
        """The useful tokens of a PPO update, and its seconds several times; the first with its compile.

        rows: the workload's first 32 rows, packed, not 8 rows of 256 tokens.
        """
        if rows:
            jobs = self.jobs[:32]
            lengths = [min(700, len(prompt) + k) for prompt, k in jobs]
            prompt_lens, max_len, micro_batch = [len(prompt) for prompt, _ in jobs], 700, FLAGS.micro_batch
        else:
            lengths, prompt_lens, max_len, micro_batch = [256] * 8, [1] * 8, 256, 8
        packing = self.pack(self.random_rows(lengths), prompt_lens, max_len, micro_batch)
        optimizer = make_optimizer(optax.constant_schedule(3e-7), weight_decay=0.0, clip_norm=1.0)
        abstract = abstract_params(self.model, ValueHead(), "value_head")
        head = {"weight": jnp.zeros(self.model.config.hidden_size), "bias": jnp.zeros(())}
        old, _ = make_scorer(self.model, 1.0)({"lm": self.lm}, packing.lines, packing.count)
        advantage = packing.spread(np.random.default_rng(1).normal(size=len(packing.at[0])))
        weight = packing.spread(1 / len(packing.at[0]))
        batch = PPOBatch(weight, np.asarray(old), advantage, advantage, advantage)
        ppo = PPO(kl_coef=0.01, gamma=1.0, lam=0.95, clip=0.2, value_clip=0.2, vf_coef=5.0, temperature=1.0)
        step = make_step(partial(rl_loss, ppo), self.model, optimizer, state_shardings(self.mesh, optimizer, abstract))
        params = {"lm": self.taken_over(), "value_head": head}
        state, taken = new_state(self.mesh, optimizer, abstract, params), []
        for _ in range(2 if rows else 3):
            begun = time.perf_counter()
            state, metrics = step(state, (packing.lines, batch), packing.count)
            jax.block_until_ready(state)
            taken.append(time.perf_counter() - begun)
        assert np.isfinite(metrics["loss"])
        print(
            f"  {sum(lengths)} tokens in lines of {packing.length}, {packing.padding:.1%} padding; first step "
            f"{taken[0]:.1f} s with its compile",
            flush=True,
        )
        return sum(lengths), taken

    def update(self, rows: bool) -> float:
        """Useful tokens per second of a PPO update."""
        tokens, taken = self.update_times(rows)
        return tokens / statistics.median(taken[1:])


def main(_: list[str]) -> None:
    ours, lines = Ours(), ["| tokens per second | theirs | ours | ratio |", "| --- | --- | --- | --- |"]
    n = len(ours.jobs) // len(ours.prompts)
    sampled = ("sample", "--batch", "32", "--workload", FLAGS.workload)
    rows = {
        "sample": lambda: compared(f"sampling, {len(ours.prompts)} prompts × {n}", ours.sample, *sampled),
        "decode": ours.decode,
        "score": lambda: compared("scoring, 16 × 256", ours.score, "score", "--batch", "16", "--length", "256"),
        "update": lambda: compared(
            "update, 8 × 256", lambda: ours.update(False), "update", "--batch", "8", "--length", "256", "--repeats", "2"
        ),
        "rows": lambda: compared(
            "update, 32 rows of real lengths",
            lambda: ours.update(True),
            *("update", "--batch", "8", "--rows", "32", "--workload", FLAGS.workload),
        ),
    }
    with on_mesh(ours.mesh):
        for name in FLAGS.only:
            lines.append(rows[name]())
            print(lines[-1], flush=True)
    report("speed", f", {jax.devices()[0].device_kind}, {FLAGS.dtype}", lines, FLAGS.write)


if __name__ == "__main__":
    app.run(main)
