"""Exports in transformers 4.57, PEFT and a reader like vLLM's, in a separate environment with the versions they need.

The environment is made once, in pytest's cache, from a package index; or REFT_TRANSFORMERS4 names its Python.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from llama_tokenizers import published_config, published_json, special_tokens_map, write_folder
from test_hf_write import GENERATION, exported, published_folder
from test_tokenizer import TEXTS
from tiny import tiny_model, tiny_policy

from reft_jax import load_hf, save_hf
from reft_jax.tasks.tokenizer import encode, load_tokenizer, train_bpe

pytestmark = pytest.mark.long

READ = """
import glob, json, sys
import numpy as np, torch, transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
transformers.logging.set_verbosity_error()
found = {"version": transformers.__version__}
for folder in sys.argv[1:]:
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    kind = json.load(open(folder + "/config.json"))["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(folder, torch_dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        logits = model.eval()(ids).logits.float()
        policy = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=True))
        assert torch.equal(policy(ids).logits.float(), logits)
    # vLLM's DefaultModelLoader: every tensor of every *.safetensors in the model's folder belongs to the model
    tensors = [name for path in glob.glob(folder + "/*.safetensors") for name in load_file(path)]
    text = open(sys.argv[0] + ".txt").read()
    found[folder] = {
        "tokenizer": type(tok).__name__, "ids": tok(text, add_special_tokens=False)["input_ids"],
        "eos": tok.eos_token_id, "logits": logits.tolist(), "dtype": str(model.dtype), "pad": model.config.pad_token_id,
        "ends": getattr(model, "generation_config", None) and model.generation_config.eos_token_id, "tensors": tensors,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def python4(request: pytest.FixtureRequest) -> Path:
    if given := os.environ.get("REFT_TRANSFORMERS4"):
        return Path(given)
    folder = request.config.cache.mkdir("transformers4") / "venv"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        packages = ["transformers==4.57.6", "torch==2.13.0", "peft==0.21.2", "sentencepiece", "protobuf"]
        made = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if made.returncode:
            python.unlink()
            pytest.skip(f"transformers 4.57 could not be installed (a package index is needed): {made.stderr[-300:]}")
    return python


def test_transformers_4_peft_and_a_loader_as_vllms(python4, tmp_path, monkeypatch):
    base = published_folder(tmp_path)
    (base / "tokenizer.model").unlink()  # the stand-in is text
    folders = {
        "policy": exported(base, tmp_path / "policy", monkeypatch) and tmp_path / "policy",
        "reranker": exported(base, tmp_path / "reranker", monkeypatch, head="rerank_head") and tmp_path / "reranker",
        "toy": tmp_path / "toy",
        "shards": tmp_path / "shards",
    }
    for name, tokenizer in (("llama", "LlamaTokenizer"), ("fast", "PreTrainedTokenizerFast")):
        text, size = published_json(TEXTS)
        files = {"tokenizer.json": text, "tokenizer_config.json": published_config(tokenizer)}
        source = write_folder(tmp_path / f"{name}_base", files | {"special_tokens_map.json": special_tokens_map()})
        folders[name] = tmp_path / name
        save_hf(folders[name], *tiny_model(vocab_size=size), tokenizer=load_tokenizer(source))
    toy = train_bpe(TEXTS, 300)
    save_hf(folders["toy"], *tiny_model(vocab_size=300), tokenizer=toy)
    _, params = tiny_policy(vocab_size=300)
    save_hf(folders["shards"], tiny_model(vocab_size=300)[0], params["lm"], tokenizer=toy, max_shard_bytes=9000,
            value_head=params["value_head"])  # fmt: skip
    script = tmp_path / "read.py"
    script.write_text(READ)
    (tmp_path / "read.py.txt").write_text(TEXTS[0])
    ran = subprocess.run(
        [python4, script, *map(str, folders.values())],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    print(json.dumps({"version": found["version"]}))
    assert found["version"].startswith("4.57")
    for name, folder in folders.items():
        theirs, tok = found[str(folder)], load_tokenizer(folder)
        print(name, {key: theirs[key] for key in ("tokenizer", "eos", "ends", "pad", "dtype")}, len(theirs["tensors"]))
        assert theirs["ids"] == encode(tok, TEXTS[0]) and theirs["eos"] == tok.eos_token_id
        assert not any(tensor.startswith("v_head") for tensor in theirs["tensors"])
        if name != "reranker":
            dtype = jnp.dtype(theirs["dtype"].removeprefix("torch."))
            model, lm = load_hf(folder, dtype=dtype)
            ours = model.apply({"params": lm}, jnp.array([[5, 6, 7, 8], [9, 10, 11, 12]]))
            tolerance = 2e-5 if dtype == jnp.float32 else 0.1
            np.testing.assert_allclose(np.asarray(ours, np.float32), theirs["logits"], atol=tolerance)
    assert found[str(folders["policy"])]["ends"] == GENERATION["eos_token_id"]
    assert np.shape(found[str(folders["reranker"])]["logits"]) == (2, 2)
