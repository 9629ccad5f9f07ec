"""Measure decoding, scoring and updates at a model's shape, with random weights: no model folder, no network.

    python benchmarks/shapes.py OUT.json configs/models/CodeLlama-7b-hf.json [--toy]

The compute type is bfloat16. Decoding and scoring read bfloat16 weights; an update has float32 master weights and
optimizer state, as in a run. OUT.json also has the machine, the versions and the seconds of each first call, which
compiles. It is written again after each measurement. If one fails, its error is recorded, the others are tried, and
the exit code is 1. --toy keeps the family and the numbers of heads, and makes everything else small.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path

import jax
import jax.numpy as jnp
import speed
from machine import limits

from reft_jax.model.heads import ValueHead
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model_folder import read_json
from reft_jax.parallel.mesh import make_mesh, on_mesh, unboxed
from reft_jax.run.about import PACKAGES, commit
from reft_jax.train.state import abstract_params

TOY = {"num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 1024}


class Random(speed.Ours):
    """A model with random weights on one mesh."""

    def __init__(self, config: LlamaConfig, toy: bool):
        self.mesh, self.times = make_mesh(-1, 1, 1), 4 if toy else 16
        self.model = Llama(config, dtype=jnp.bfloat16, remat=speed.FLAGS.remat)
        self.lm = None

    def draw(self, dtype) -> float:
        """Makes the weights on the device; returns its seconds."""
        begun, self.lm = time.perf_counter(), None
        shapes = unboxed(abstract_params(self.model, ValueHead(), "value_head"))["lm"]

        leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

        @jax.jit
        def init(key):
            drawn = [
                0.02 * jax.random.normal(jax.random.fold_in(key, i), x.shape, dtype) for i, (_, x) in enumerate(leaves)
            ]
            return tree.unflatten(x + ("norm" in path[-1].key) for x, (path, _) in zip(drawn, leaves, strict=True))

        self.lm = jax.block_until_ready(init(jax.random.key(0)))
        return time.perf_counter() - begun

    def taken_over(self) -> dict:
        lm, self.lm = self.lm, None
        return lm

    def decoded(self) -> dict:
        made = self.draw(jnp.bfloat16)
        found = self.decode_step(self.times)
        return {"weights_s": made, "slots": speed.FLAGS.slots} | {f"{key}_s": value for key, value in found.items()}

    def scored(self) -> dict:
        return summary(16 * 256, self.score_times())

    def updated(self) -> dict:
        self.draw(jnp.float32)
        return summary(*self.update_times(rows=False))


def summary(tokens: int, taken: list[float]) -> dict:
    median = statistics.median(taken[1:])
    return {"tokens": tokens, "tokens_per_s": tokens / median, "median_s": median, "first_s": taken[0]}


def machine() -> dict:
    """What computed, and its measured limits."""
    flops, copied = limits("bfloat16")
    device, system = jax.devices()[0], f"{platform.machine()}, {platform.system()} {platform.release()}"
    found = {"device": device.device_kind, "devices": jax.device_count(), "backend": jax.default_backend()}
    there = {name: version(name) for name in PACKAGES if any(distributions(name=name))}  # others are not needed here
    there |= {"python": platform.python_version(), "commit": commit()}
    found |= {"cores": os.cpu_count(), "system": system, "versions": there}
    return found | {"matmul_2048_bfloat16_flop_per_s": flops, "copy_bytes_per_s": copied}


def peak() -> int | None:
    """The most bytes of the device's memory in use since the process began; None where a device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("shape", type=Path, help="a config.json")
    parser.add_argument("--toy", action="store_true")
    asked = parser.parse_args()
    raw, slots = read_json(asked.shape), 8 if asked.toy else 64
    if asked.toy:
        raw |= TOY | {"hidden_size": 8 * raw["num_attention_heads"]}
    speed.FLAGS(["shapes", "--model=-", "--workload=-", "--dtype=bfloat16", "--remat=full", f"--slots={slots}"])
    model = Random(LlamaConfig.from_hf(raw, str(asked.shape)), asked.toy)
    found, failed = {"shape": asked.shape.stem, "toy": asked.toy, "machine": machine()}, False
    parts: dict[str, Callable[[], dict]] = {"decode": model.decoded, "score": model.scored, "update": model.updated}
    with on_mesh(model.mesh):
        for name, part in parts.items():
            try:
                found[name] = part() | {"peak_bytes": peak()}
            except Exception as error:  # out of memory, or what this backend cannot do: the other parts still count
                failed, reason = True, " ".join(str(error).split())[:300]
                found[name] = {"error": f"{type(error).__name__}: {reason}"}
            print(name, json.dumps(found[name]), flush=True)
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
