"""How far int8 rollouts are from bfloat16 and float32 on real weights: greedy texts, and sampler against trainer.

    python benchmarks/int8.py MODEL_DIR [--prompts=50] [--tokens=64] [--only=bfloat16,int8]

The questions are generated; the prompts are the method's. Weights are read in bfloat16. Prints one row per sampler as
it is measured (--only: float32 and those with one of these words in their name):

- greedy: how many texts are float32's to the last token, and how many tokens are before the first other one (mean).
- gap: |log π_trainer − log π_sampler| of the tokens that the sampler draws at temperature 1, as in a run's metrics. The
  trainer computes in the sampler's dtype and has unquantized weights.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from reft_jax.engine.generate import Engine
from reft_jax.model.hf import load_hf
from reft_jax.parallel.mesh import make_mesh, on_mesh, put_rows
from reft_jax.tasks.prompts import rollout_prompt
from reft_jax.tasks.tokenizer import encode, load_tokenizer
from reft_jax.toy.problems import make_split
from reft_jax.train.batches import rollout_rows
from reft_jax.train.iteration import gap_metrics
from reft_jax.train.packing import pack_rollout
from reft_jax.train.scoring import make_scorer
from reft_jax.types import Prompt

SEED, MULTIPLE = 42, 64
SAMPLERS = {  # name: compute dtype, what is int8
    "float32": ("float32", ()),
    "float32, int8 weights": ("float32", ("weights",)),
    "float32, int8 weights and cache": ("float32", ("weights", "cache")),
    "bfloat16": ("bfloat16", ()),
    "bfloat16, int8 weights": ("bfloat16", ("weights",)),
    "bfloat16, int8 weights and cache": ("bfloat16", ("weights", "cache")),
}


class Sampler:
    """One model in one precision."""

    def __init__(self, mesh, model, lm, int8, prompts, tokens: int):
        self.mesh, self.model, self.lm, self.prompts = mesh, model, lm, prompts
        self.limits = [len(prompt.tokens) + tokens for prompt in prompts]
        self.engine = Engine(model, mesh, slots=len(prompts), pad_multiple=MULTIPLE, eos_id=-1, seed=SEED, int8=int8)

    def completions(self, temperature: float) -> list:
        found = dict(self.engine.generate(self.lm, self.prompts, max_len=self.limits, temperature=temperature))
        return [found[i] for i in range(len(self.prompts))]

    def texts(self) -> np.ndarray:
        """Greedy tokens, int32[prompts,tokens]."""
        return np.array([completion.tokens for completion in self.completions(0.0)])

    def gap(self) -> dict[str, float]:
        completions = self.completions(1.0)
        rollout = rollout_rows(self.prompts, completions, np.zeros(len(completions)), MULTIPLE)
        size = {"micro_batch": 1, "micro_batches": len(completions), "max_len": rollout.tokens.shape[1]}
        packing = pack_rollout(rollout, **size, multiple=MULTIPLE)
        lines = put_rows(self.mesh, packing.lines, axis=1)
        logprob, _ = make_scorer(self.model, 1.0)({"lm": self.lm}, lines, packing.count)
        trainer = packing.collect(logprob, rollout.tokens.shape[1])[packing.at]
        return gap_metrics(trainer - np.concatenate([completion.logprobs for completion in completions]))


def row(name: str, texts: np.ndarray, expected: np.ndarray, gap: dict[str, float]) -> str:
    same = (texts == expected).cumprod(1).sum(1)  # tokens before the first other one
    numbers = [f"{(same == texts.shape[1]).sum()} of {len(texts)}", f"{same.mean():.1f}"]
    numbers += [f"{gap['sampler_gap' + end]:.4f}" for end in ("_mean", "_p999", "")]
    return "| " + " | ".join([name, *numbers, f"{gap['sampler_outside']:.2%}", f"{gap['sampler_ess']:.4f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    tokenizer, mesh = load_tokenizer(asked.model), make_mesh(1, 1, 1)
    examples = make_split(SEED, "train", asked.prompts, answer_format="python", skipped_share=0.0)
    ids = [encode(tokenizer, rollout_prompt(example.question, "python")) for example in examples]
    prompts = [Prompt(e.item_id, 0, np.array(one, np.int32)) for e, one in zip(examples, ids, strict=True)]
    model, lm = load_hf(asked.model, dtype=jnp.bfloat16)
    print(f"{asked.model.name}: {asked.prompts} prompts, {asked.tokens} tokens each\n")
    print("| sampler | greedy texts as float32 | tokens before another | gap mean | 99.9 % | largest | outside | ESS |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    expected, words = None, asked.only.split(",")
    with on_mesh(mesh):
        for name, (dtype, int8) in SAMPLERS.items():
            if expected is not None and not any(word in name for word in words):
                continue
            sampler = Sampler(mesh, model.clone(dtype=jnp.dtype(dtype)), lm, int8, prompts, asked.tokens)
            texts = sampler.texts()
            expected = texts if expected is None else expected
            print(row(name, texts, expected, sampler.gap()), flush=True)


if __name__ == "__main__":
    main()
