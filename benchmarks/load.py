"""How much host memory does loading CodeLlama-7B take beyond its parameters? Random weights in three files, 13.5 GB.

    python benchmarks/load.py --scratch=/tmp

Writes a model folder below --scratch (16 GB free): bfloat16, with some float32 and float16 tensors in the last file.
Loads it onto 8 virtual CPU devices, sharded over all of them and kept in bfloat16, compares tensors with the files, and
removes the folder. Anonymous memory is RssAnon of this process, read every 10 ms; mapped pages of the files do not
count, because the kernel can take them back. Needs 16 GiB of free memory. Rewrites the table in benchmarks/README.md.
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from machine import report

from reft_jax.model.hf import load_hf, stored_in
from reft_jax.model.hf_write import save_hf
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.safetensors import DTYPES, map_tensor, read_header, write_tensors
from reft_jax.parallel.mesh import make_mesh, shardings, unboxed

FLAGS = flags.FLAGS
flags.DEFINE_string("scratch", tempfile.gettempdir(), "where the model folder is made and removed")
flags.DEFINE_bool("write", True, "rewrite the table in benchmarks/README.md")
CODELLAMA_7B = LlamaConfig(32016, 4096, 11008, 32, 32, 32, 128)
GIB = 2**30


class RandomStack:
    """A stacked parameter that draws each layer when it is indexed."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self.dtype = shape, np.dtype(jnp.bfloat16)

    def __getitem__(self, layer: int) -> np.ndarray:
        return random_weights(self.shape[1:])


def random_weights(shape: tuple[int, ...]) -> np.ndarray:
    """Random bfloat16 of both signs between 0.008 and 0.03, which float16 represents exactly."""
    bits = np.frombuffer(np.random.default_rng(0).bytes(2 * int(np.prod(shape))), np.uint16)
    return ((bits & 0x80FF) | 0x3C00).view(jnp.bfloat16).reshape(shape)


def write_folder(folder: Path, model: Llama, abstract) -> None:
    """Writes three files; in the last one, every eighth tensor is float32 and every eighth float16."""
    params = jax.tree.map(lambda x: RandomStack(x.shape) if x.shape[0] == 32 else random_weights(x.shape), abstract)
    save_hf(folder, model, params, max_shard_bytes=4.6e9)
    last = sorted(folder.glob("*.safetensors"))[-1]
    stored, kinds = read_header(last), ["F32", "F16", *["BF16"] * 6]
    layout = {name: (DTYPES[kinds[i % 8]], one.shape) for i, (name, one) in enumerate(stored.items())}
    write_tensors(last.with_suffix(".new"), layout, (map_tensor(one) for one in stored.values()))
    last.with_suffix(".new").rename(last)


def anonymous_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


@contextmanager
def peak_anonymous() -> Iterator[list[int]]:
    """Yields a list whose one entry is the peak of anonymous bytes when the context ends."""
    seen, done = [anonymous_bytes()], threading.Event()

    def look():
        while not done.wait(0.01):
            seen[0] = max(seen[0], anonymous_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def check(folder: Path, lm) -> None:
    """Asserts that some tensors of every orientation and every file equal those in the files."""
    stored, layers = stored_in(folder), lm["layers"]
    for layer in (0, 15, 31):
        named = {"mlp.down_proj": layers["down"], "self_attn.q_proj": layers["q"], "self_attn.o_proj": layers["o"]}
        for name, ours in named.items():
            theirs = np.asarray(map_tensor(stored[f"model.layers.{layer}.{name}.weight"]), np.float32)
            one = np.asarray(ours[layer], np.float32)
            assert np.array_equal(one.reshape(theirs.shape[::-1]).T, theirs), (layer, name)
    assert np.array_equal(np.asarray(lm["embed"]), np.asarray(map_tensor(stored["model.embed_tokens.weight"])))


def main(_: list[str]) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    model = Llama(CODELLAMA_7B)
    boxed = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    mesh = make_mesh(1, 4, 2)
    with tempfile.TemporaryDirectory(dir=FLAGS.scratch) as scratch:
        folder, begun = Path(scratch) / "model", time.perf_counter()
        write_folder(folder, model, unboxed(boxed))
        on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"written, {on_disk / 1e9:.1f} GB in {time.perf_counter() - begun:.0f} s", flush=True)
        before, begun = anonymous_bytes(), time.perf_counter()
        with peak_anonymous() as peak:
            _, lm = load_hf(folder, dtype=jnp.bfloat16, shardings=shardings(mesh, boxed))
            jax.block_until_ready(lm)
        seconds = time.perf_counter() - begun
        parameters = sum(x.nbytes for x in jax.tree.leaves(lm))
        check(folder, lm)
    lines = [
        "| | |",
        "| --- | --- |",
        f"| on disk, GB in three files | {on_disk / 1e9:.2f} |",
        f"| parameters, GiB | {parameters / GIB:.2f} |",
        f"| anonymous memory before, GiB | {before / GIB:.2f} |",
        f"| its peak, GiB | {peak[0] / GIB:.2f} |",
        f"| above the parameters, GiB | {(peak[0] - parameters) / GIB:.2f} |",
        f"| seconds | {seconds:.0f} |",
    ]
    print("\n".join(lines))
    report("load", ", mesh 1×4×2, bfloat16", lines, FLAGS.write)


if __name__ == "__main__":
    app.run(main)
