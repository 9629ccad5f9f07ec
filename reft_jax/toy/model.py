"""The embedded default: generated word problems and an untrained tiny Llama, in the formats of real ones.

It lets the whole chain run without any files from outside. It is not meant to be a useful model.
"""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np

from reft_jax.model.hf_write import save_hf
from reft_jax.model.llama import Llama, boxed_shapes
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.parallel.mesh import unboxed
from reft_jax.store import remove, write_whole
from reft_jax.tasks import prompts
from reft_jax.tasks.registry import load_task
from reft_jax.tasks.tokenizer import train_bpe
from reft_jax.toy import problems
from reft_jax.types import Example

MADE = "made_by_reft_jax.txt"


def write_data(config, folder: Path) -> dict[str, str]:
    """Writes train.json, dev.json and test.json in the format of real data files and returns their paths by split.

    With `toy.drop_skipped`, train.json has only the good annotations. Files that exist are kept. The first one, MADE,
    says who made the folder.
    """
    toy, paths = config.toy, {}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MADE).exists():
        write_whole(folder / MADE, "reft_jax made this folder, and may remove it\n")
    for split, rows in (("train", toy.train_rows), ("dev", toy.dev_rows), ("test", toy.test_rows)):
        path = folder / f"{split}.json"
        paths[split] = str(path)
        if path.exists():
            continue
        made = problems.make_problems(config.seed, split, rows, config.data.format, toy.skipped_share)
        kept = [p.example for p in made if not (split == "train" and toy.drop_skipped and p.skipped)]
        records = [{k: v for k, v in example._asdict().items() if v is not None} for example in kept]
        write_whole(path, json.dumps(records, indent=1))
    return paths


def toy_config(config, vocab_size: int) -> LlamaConfig:
    """The shapes of the tiny Llama, from the settings `toy.*`."""
    toy = config.toy
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=toy.hidden_size,
        intermediate_size=toy.mlp_size,
        num_layers=toy.layers,
        num_heads=toy.heads,
        num_kv_heads=toy.heads,
        head_dim=toy.hidden_size // toy.heads,
        max_position_embeddings=config.sample.max_len,
    )


def write_model(config, train: list[Example], folder: Path) -> None:
    """Writes a tokenizer trained on the generated text and a randomly initialised Llama as a Hugging Face folder.

    A folder with a config.json is kept as it is.
    """
    if (folder / "config.json").exists():
        return
    remove(folder)
    toy, answer_format, task = config.toy, config.data.format, load_task(config.task)
    texts = [prompts.prompt_text(e.question, task) + prompts.sft_target(e, answer_format, task) for e in train]
    tokenizer = train_bpe(texts, toy.vocab_size)
    model, rng = Llama(toy_config(config, len(tokenizer))), np.random.default_rng(config.seed)
    params = jax.tree_util.tree_map_with_path(partial(initial, rng), unboxed(boxed_shapes(model.config)))
    save_hf(folder, model, params, tokenizer=tokenizer)


def initial(rng: np.random.Generator, path, leaf) -> np.ndarray:
    """Draws weights that keep activations at unit variance. With Llama's 0.02 this small model loses minutes first."""
    name, shape = path[-1].key, leaf.shape
    if name.endswith("norm"):
        return np.ones(shape, np.float32)
    # Layers are stacked: [L,D,…], and o is [L,N,H,D]. embed is [V,D] and sets the scale; kernel is [D,V].
    fan_in = {"embed": 1, "kernel": shape[0], "o": shape[1] * shape[-2]}.get(name, shape[1])
    return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
