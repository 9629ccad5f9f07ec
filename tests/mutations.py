"""Would the tests notice? Plants one-line mistakes, one after another, and shows that a test fails for each.

    python tests/mutations.py            all of them; exit code 1 if one goes unnoticed
    python tests/mutations.py gae        those whose name contains "gae"

Nothing is written: a mutated module exists only in this process, which imports the package anew for every mutation.
"""

import importlib.abc
import importlib.util
import io
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
ALGO = ("test_advantages.py", "test_losses.py")


class Mutation(NamedTuple):
    """A mistake: `old` stands once in `module` and becomes `new`; one of `tests` must fail."""

    name: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...] = ALGO


A, L, S = "reft_jax.algo.advantages", "reft_jax.algo.losses", "reft_jax.train.steps"
BATCH = ("test_steps.py::test_a_ppo_batch_equals_its_slow_twin",)
MUTATIONS = [
    Mutation("mask starts one late", A, "t >= prompt_len[:, None] - 1", "t >= prompt_len[:, None]"),
    Mutation("mask starts one early", A, "t >= prompt_len[:, None] - 1", "t >= prompt_len[:, None] - 2"),
    Mutation("mask leaves EOS out", A, "t <= total_len[:, None] - 2", "t <= total_len[:, None] - 3"),
    Mutation("mask takes padding in", A, "t <= total_len[:, None] - 2", "t <= total_len[:, None] - 1"),
    Mutation("KL with the wrong sign", A, "-kl_coef * (old", "kl_coef * (old"),
    Mutation("KL paid on padding", A, "jnp.where(mask, -kl_coef * (old_logprob - ref_logprob), 0.0)",
             "-kl_coef * (old_logprob - ref_logprob)"),
    Mutation("KL as a square", A, "-kl_coef * (old_logprob - ref_logprob)",
             "-kl_coef * 0.5 * (old_logprob - ref_logprob) ** 2"),
    Mutation("score on the first action", A, "mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))",
             "mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))"),
    Mutation("score on every action", A, "jnp.where(last, score", "jnp.where(mask, score"),
    Mutation("score truncated to an integer", A, "jnp.where(last, score[:, None], 0.0)",
             "jnp.where(last, score[:, None].astype(int), 0)"),
    Mutation("gae without discount", A, "rewards + gamma * next_values", "rewards + next_values"),
    Mutation("gae with lambda only", A, "delta + gamma * lam * advantage", "delta + lam * advantage"),
    Mutation("gae forgets the value", A, "gamma * next_values - values", "gamma * next_values"),
    Mutation("gae forward in time", A, "deltas.T, reverse=True", "deltas.T, reverse=False"),
    Mutation("gae reads values off the mask", A, "    values = jnp.where(mask, values, 0.0)\n", ""),
    Mutation("returns without the value", A, "return advantages, advantages + values", "return advantages, advantages"),
    Mutation("Bessel dropped", A, "jnp.maximum(count - 1, 1)", "count"),
    Mutation("whitening without the mean", A, "jnp.where(mask, (x - mean) * jax", "jnp.where(mask, x * jax"),
    Mutation("whitening over padding", A, "mean, variance = masked_moments(x, mask)\n    return jnp.where(mask, (x",
             "mean, variance = x.mean(), x.var()\n    return jnp.where(mask, (x"),
    Mutation("whitening by the variance", A, "jax.lax.rsqrt(variance + 1e-8)", "1 / (variance + 1e-8)"),
    Mutation("explained variance of values", A, "masked_moments(returns - values, mask)",
             "masked_moments(values, mask)"),
    Mutation("policy clip below only", L, "jnp.clip(ratio, 1 - clip, 1 + clip)", "jnp.maximum(ratio, 1 - clip)"),
    Mutation("policy clip above only", L, "jnp.clip(ratio, 1 - clip, 1 + clip)", "jnp.minimum(ratio, 1 + clip)"),
    Mutation("policy loss takes the better", L, "jnp.maximum(-advantage * ratio", "jnp.minimum(-advantage * ratio"),
    Mutation("policy gradient uphill", L, "row_means(jnp.maximum(-advantage * ratio, -advantage *",
             "row_means(jnp.maximum(advantage * ratio, advantage *"),
    Mutation("ratio upside down", L, "jnp.where(mask, logprob - old_logprob, 0.0)",
             "jnp.where(mask, old_logprob - logprob, 0.0)"),
    Mutation("value loss unclipped", L, "0.5 * jnp.maximum(jnp.square(value - return_), jnp.square(clipped - return_))",
             "0.5 * jnp.square(value - return_)"),
    Mutation("value loss takes the smaller", L, "0.5 * jnp.maximum(", "0.5 * jnp.minimum("),
    Mutation("value loss doubled", L, "row_means(0.5 * ", "row_means(1.0 * "),
    Mutation("mean over padding too", L, "/ jnp.maximum(mask.sum(1), 1)", "/ mask.shape[1]"),
    Mutation("mean divides by zero", L, "/ jnp.maximum(mask.sum(1), 1)", "/ mask.sum(1)"),
    Mutation("returns from whitened advantages", S,
             "advantages.whiten(advantage, mask), return_), metrics",
             "advantages.whiten(advantage, mask), advantages.whiten(advantage, mask) + value), metrics", BATCH),
    Mutation("advantages not whitened", S, "value, advantages.whiten(advantage, mask), return_), metrics",
             "value, advantage, return_), metrics", BATCH),
    Mutation("reference and policy swapped", S, "token_rewards(rollout.score, logprob, ref_logprob, mask",
             "token_rewards(rollout.score, ref_logprob, logprob, mask", BATCH),
    Mutation("KL of the metrics with the wrong sign", S, "jnp.where(mask, logprob - ref_logprob, 0.0).sum(1).mean()",
             "jnp.where(mask, ref_logprob - logprob, 0.0).sum(1).mean()", BATCH),
    Mutation("temperature on the sampler's side only", "reft_jax.train.scoring",
             'method="unembed") / temperature', 'method="unembed")', ("test_scoring.py",)),
    Mutation("temperature on the trainer's side only", "reft_jax.engine.sampling",
             "logits = logits / (temperature or 1.0)", "logits = logits / 1.0",
             ("test_engine.py::test_logprobs_are_those_of_a_full_forward_at_the_temperature",)),
    Mutation("log-probability of this token, not the next", "reft_jax.train.scoring", "tokens, inside + 1, 1",
             "tokens, inside, 1", ("test_scoring.py",)),
    Mutation("a wrong answer earns nothing", "reft_jax.task.answers", "else 0.1", "else 0.0", ("test_answers.py",)),
    Mutation("no answer earns a tenth", "reft_jax.task.answers", "0.0 if value is None else 0.1", "0.1",
             ("test_answers.py",)),
]  # fmt: skip


class Planted(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a source in memory."""

    def __init__(self, module: str, source: str, path: Path):
        self.module, self.source, self.path = module, source, path

    def find_spec(self, fullname, path, target=None):
        return (
            importlib.util.spec_from_loader(fullname, self, origin=str(self.path)) if fullname == self.module else None
        )

    def get_filename(self, fullname):
        return str(self.path)

    def get_data(self, path):
        return self.source.encode()


def forget() -> None:
    """The next import of the package or of a test reads it anew. The heavy libraries stay."""
    for name in list(sys.modules):
        path = getattr(sys.modules[name], "__file__", None) or ""
        if name.partition(".")[0] == "reft_jax" or (Path(path).parent == TESTS and name != "__main__"):
            del sys.modules[name]


def failing(tests) -> tuple[int, str]:
    """pytest's exit code for these tests, and what it printed; stops at the first failure."""
    forget()
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *(str(TESTS / test) for test in tests)])
    return int(code), said.getvalue()


def survives(mutation: Mutation) -> str:
    """'' if a test failed, else what happened instead."""
    path = REPO / (mutation.module.replace(".", "/") + ".py")
    source = path.read_text()
    if source.count(mutation.old) != 1:
        return f"its text stands {source.count(mutation.old)} times in {path.name}; bring tests/mutations.py up to date"
    planted = Planted(mutation.module, source.replace(mutation.old, mutation.new), path)
    sys.meta_path.insert(0, planted)
    try:
        code, said = failing(mutation.tests)
    finally:
        sys.meta_path.remove(planted)
    if code == pytest.ExitCode.TESTS_FAILED:
        return ""
    return "NOT NOTICED" if code == pytest.ExitCode.OK else f"pytest ended with {code}: {said[-500:]}"


def main(wanted: str = "") -> int:
    sys.dont_write_bytecode = True
    chosen = [mutation for mutation in MUTATIONS if wanted in mutation.name]
    code, said = failing(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
    if code:
        print(f"the tests fail as they are:\n{said}")
        return 1
    unnoticed = 0
    for mutation in chosen:
        started = time.monotonic()
        problem = survives(mutation)
        unnoticed += bool(problem)
        print(f"{time.monotonic() - started:5.1f} s  {mutation.name}: {problem or 'noticed'}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} mutations noticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
