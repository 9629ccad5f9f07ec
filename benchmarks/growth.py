"""Does the cost of a rollout grow as it should? Measured on a small Llama with random weights and given lengths.

    python benchmarks/growth.py

The same 512 completions are drawn as 512, 128, 32 and 8 prompts with 1, 4, 16 and 64 samples: the decode time per
token must not change, and each prompt must be prefilled once. Then four times as many prompts: four times the time,
and no more memory. The cases run in turns, and the table has medians. Peak memory is that of the first runs, which
compile, one case after another. Rewrites the table in benchmarks/README.md.
"""

import resource
import statistics
import time

import jax
import numpy as np
from absl import app, flags
from machine import report

from reft_jax.engine import slots as device
from reft_jax.engine.generate import Engine
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.parallel.mesh import make_mesh, unboxed
from reft_jax.types import Prompt

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 7, "how often each case runs after the run that compiles", lower_bound=1)
flags.DEFINE_bool("write", True, "rewrite the table in benchmarks/README.md")
COMPLETIONS, PROMPT, SLOTS = 512, 48, 32
CONFIG = LlamaConfig(2048, 128, 344, 4, 4, 2, 32)


def random_weights(model: Llama):
    shapes = unboxed(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.05, x.shape), x.dtype), shapes)


def requests(completions: int, n: int) -> tuple[list[Prompt], np.ndarray]:
    """Prompts of equal length, and the largest total length of each row; the lengths do not depend on n."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, CONFIG.vocab_size, PROMPT).astype(np.int32) for _ in range(completions // n)]
    lengths = np.minimum(192, np.random.default_rng(2).lognormal(4.2, 0.5, completions).astype(int) + 1)
    return [Prompt(f"toy_{i // n}", i % n, rows[i // n]) for i in range(completions)], PROMPT + lengths


class TimedDecode:
    """The engine's compiled decode function, which waits for its result and measures the time."""

    def __init__(self):
        self.decode, self.seconds = device.decode, 0.0

    def __call__(self, *args, **settings):
        jax.block_until_ready(args)
        begun = time.perf_counter()
        slots = jax.block_until_ready(self.decode(*args, **settings))
        self.seconds += time.perf_counter() - begun
        return slots


class Case:
    """`completions` completions with `n` samples per prompt, drawn repeatedly by one engine."""

    def __init__(self, model: Llama, completions: int, n: int):
        self.completions, self.n = completions, n
        self.prompts, self.limits = requests(completions, n)
        self.engine = Engine(model, make_mesh(-1, 1, 1), slots=SLOTS, pad_multiple=16, eos_id=-1, seed=0)
        self.taken: list[tuple[float, float]] = []

    def run(self, lm) -> None:
        """Records the seconds of one run, and how many of them were decode steps."""
        self.engine.counts.clear()
        device.decode.seconds, begun = 0.0, time.perf_counter()
        for _ in self.engine.generate(lm, self.prompts, max_len=self.limits, temperature=1.0):
            pass
        self.taken.append((time.perf_counter() - begun, device.decode.seconds))

    def line(self, peak: float) -> str:
        counts, (seconds, decoding) = self.engine.counts, map(statistics.median, zip(*self.taken, strict=True))
        return (
            f"| {self.completions} | {self.completions // self.n} × {self.n} | {seconds:.2f} | "
            f"{counts['prompt_tokens']} | {counts['tokens']} | {1e6 * decoding / counts['tokens']:.1f} | {peak:.0f} |"
        )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(_: list[str]) -> None:
    model = Llama(CONFIG)
    lm, device.decode = random_weights(model), TimedDecode()
    lines = [
        "| completions | prompts × n | s | prompt tokens prefilled | tokens drawn | decode µs per token | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    cases, peaks = [Case(model, COMPLETIONS, n) for n in (1, 4, 16, 64)] + [Case(model, 4 * COMPLETIONS, 4)], []
    for case in cases:  # these compile
        case.run(lm)
        peaks.append(peak_mib())
        case.taken.clear()
    for _ in range(FLAGS.rounds):
        for case in cases:
            case.run(lm)
    for case, peak in zip(cases, peaks, strict=True):
        lines.append(case.line(peak))
        print(lines[-1], flush=True)
    report("growth", "", lines, FLAGS.write)


if __name__ == "__main__":
    app.run(main)
