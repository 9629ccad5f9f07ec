"""What a written folder has in addition to its weights: the base's files, ids and types; and failed writes."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from llama_tokenizers import INFILL, published_config, published_json, special_tokens_map, write_folder
from test_tokenizer import TEXTS
from tiny import tiny_model, tiny_policy

from reft_jax import load_hf, load_value_head, save_hf
from reft_jax.commands import export
from reft_jax.config import default_config
from reft_jax.model.hf import VALUE_HEAD_FILE
from reft_jax.model.safetensors import map_tensor, read_header
from reft_jax.model_folder import check_new_folder
from reft_jax.run.inputs import Data, Inputs
from reft_jax.run.machine import Machine
from reft_jax.run.open import Run, Workdir
from reft_jax.tasks.tokenizer import all_end_ids, encode, load_tokenizer, train_bpe
from reft_jax.types import InputError

TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": 0, "do_sample": True, "temperature": 0.6}


@pytest.fixture
def base(tmp_path) -> Path:
    return published_folder(tmp_path)


def published_folder(tmp_path: Path) -> Path:
    """A folder as people download it: bfloat16, several end ids, files that only some tools read."""
    text, size = published_json(TEXTS, infill=True)
    model, params = tiny_model(vocab_size=size)
    folder = tmp_path / "base"
    save_hf(folder, model, params, dtype=jnp.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": 0}
    write_folder(folder, {"config.json": config | ids, "generation_config.json": json.dumps(GENERATION, indent=4)})
    write_folder(folder, {"LICENSE": "the licence", "modeling_mine.py": "raise SystemExit", "README.md": "base"})
    files = {"tokenizer.json": text, "tokenizer_config.json": published_config("CodeLlamaTokenizer", chat_template="x")}
    files["special_tokens_map.json"] = special_tokens_map(additional_special_tokens=INFILL)
    files |= {"added_tokens.json": "{ }\n", "chat_template.jinja": "{{ messages }}\n", "tokenizer.model": "(not read)"}
    write_folder(folder, files)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    return folder


def exported(base: Path, out: Path, monkeypatch, dtype=None, head="value_head") -> dict:
    """`run_export` of a model as a stage leaves it, in float32; returns what config.json says."""
    model, _ = load_hf(base)
    _, params = tiny_policy(head, vocab_size=model.config.vocab_size)
    monkeypatch.setattr(export, "load_model", lambda run, name, abstract=None: params)
    monkeypatch.setattr(export, "abstract_reranker", lambda run: None)
    monkeypatch.setattr(export, "model_card", lambda run, name, licences: f"card of {name}")
    inputs = Inputs(default_config(), base, load_tokenizer(base), Data([], [], [], ""))
    run = Run(inputs, Machine(None, model, None), Workdir(base.parent, None), None)
    export.run_export(run, "rerank_reft" if head == "rerank_head" else "reft", out, dtype)
    return json.loads((out / "config.json").read_text())


def test_an_export_has_the_bases_files_byte_by_byte(base, tmp_path, monkeypatch):
    config = exported(base, tmp_path / "out", monkeypatch)
    for name in {*TOKENIZER_FILES, "generation_config.json", "LICENSE", "additional_chat_templates/rag.jinja"}:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    assert (tmp_path / "out" / "README.md").read_text() == "card of reft"
    assert not list((tmp_path / "out").glob("*.py"))
    assert {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype")} == {
        "bos_token_id": 1,
        "eos_token_id": [2, 9],
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    header = read_header(tmp_path / "out" / "model.safetensors")
    assert {stored.dtype for stored in header.values()} == {"BF16"}
    again = load_tokenizer(tmp_path / "out")
    assert encode(again, TEXTS[0]) == encode(load_tokenizer(base), TEXTS[0])
    assert all_end_ids(again, tmp_path / "out") == [2, 9]


def test_the_end_that_training_appends_is_among_the_ends(base, tmp_path, monkeypatch):
    """A base whose settings name others: without the tokenizer's own EOS the tuned model would never stop."""
    config = json.loads((base / "config.json").read_text())
    write_folder(base, {"config.json": config | {"eos_token_id": 9}})
    write_folder(base, {"generation_config.json": GENERATION | {"eos_token_id": [9, 11]}})
    assert exported(base, tmp_path / "out", monkeypatch)["eos_token_id"] == [9, 2]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION | {
        "eos_token_id": [9, 11, 2]
    }
    assert all_end_ids(load_tokenizer(base), base) == [2, 9, 11]


@pytest.mark.parametrize(
    ("pad", "token", "expected"),
    [(0, None, 0), (-1, None, None), (None, None, None), (None, "<unk>", 0), (5000, "[PAD]", None)],
)
@pytest.mark.parametrize("head", ["value_head", "rerank_head"])
def test_a_padding_id_is_one_of_the_model_and_a_reranker_has_one(
    base, tmp_path, monkeypatch, pad, token, expected, head
):
    config = json.loads((base / "config.json").read_text())
    write_folder(base, {"config.json": config | {"pad_token_id": pad}})
    write_folder(base, {"tokenizer_config.json": published_config("CodeLlamaTokenizer", pad_token=token)})
    found = exported(base, tmp_path / "out", monkeypatch, head=head)["pad_token_id"]
    assert found == (2 if expected is None and head == "rerank_head" else expected)


def test_transformers_scores_two_rows_with_an_exported_reranker(base, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    config = json.loads((base / "config.json").read_text())
    write_folder(base, {"config.json": config | {"pad_token_id": None}})
    exported(base, tmp_path / "out", monkeypatch, dtype="float32", head="rerank_head")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    pad = theirs.config.pad_token_id
    rows = torch.tensor([[5, 6, 7, 8], [9, 10, 11, pad]])
    with torch.no_grad():
        both = theirs(rows, attention_mask=(rows != pad).long()).logits
        alone = [theirs(rows[i : i + 1, :size]).logits[0] for i, size in enumerate((4, 3))]
    assert both.shape == (2, 2)
    torch.testing.assert_close(both, torch.stack(alone))


def test_without_a_tokenizer_nothing_is_claimed(tmp_path):
    save_hf(tmp_path / "out", *tiny_model())
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, None, None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_other_tokenizers_are_written_in_words_that_transformers_4_knows(tmp_path):
    """Its PreTrainedTokenizerFast is TokenizersBackend in 5, and a list of extra_special_tokens ends it."""
    toy = train_bpe(TEXTS, 300)
    toy.save_pretrained(tmp_path / "toy")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "toy")
    theirs.add_special_tokens({"extra_special_tokens": ["<|eot|>"]})
    save_hf(tmp_path / "theirs", *tiny_model(vocab_size=310), tokenizer=theirs)
    for name, extra in (("toy", None), ("theirs", ["<|eot|>"])):
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
        assert config.get("additional_special_tokens") == extra
        again = load_tokenizer(tmp_path / name)
        assert encode(again, TEXTS[0]) == encode(toy, TEXTS[0]) and again.eos_token == "<eos>"
    assert "<|eot|>" in again.all_special_tokens


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        (
            jnp.float16,
            1e5,
            r"dtype=float16: tensor model\.layers\.1\.mlp\.down_proj\.weight has 100000, more than",
        ),
        (jnp.float16, -65520.0, r"has 65520, more than float16 holds \(65504\); choose bfloat16 or float32"),
        ("int8", 1.0, r"dtype='int8': allowed: float32, float16, bfloat16, float64$"),
        ("half a float", 1.0, r"dtype='half a float': allowed: float32, float16, bfloat16, float64$"),
        (jnp.bfloat16, 3.4e38, r"dtype=bfloat16: .* has 3\.4e\+38, more than bfloat16 holds"),
    ],
)
def test_a_number_that_would_become_infinite_is_an_error(tmp_path, dtype, value, words):
    model, params = tiny_model()
    params["layers"]["down"] = params["layers"]["down"].at[1, 2, 3].set(value)
    with pytest.raises(InputError, match=words):
        save_hf(tmp_path / "out", model, params, dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    largest = params | {"layers": params["layers"] | {"down": params["layers"]["down"].at[1, 2, 3].set(65504.0)}}
    save_hf(tmp_path / "out", model, largest, dtype=jnp.float16)
    stored = read_header(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert map_tensor(stored).max() == 65504


def test_the_value_head_is_out_of_the_reach_of_loaders_and_the_old_place_is_read(base, tmp_path, monkeypatch):
    exported(base, tmp_path / "out", monkeypatch)
    _, params = tiny_policy(vocab_size=load_hf(base)[0].config.vocab_size)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, load_value_head(tmp_path / "out"), params["value_head"])
    (tmp_path / "out" / VALUE_HEAD_FILE).rename(tmp_path / "out" / "value_head.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_value_head(tmp_path / "out"), params["value_head"])
    (tmp_path / "out" / "value_head.safetensors").unlink()
    assert load_value_head(tmp_path / "out") is None
    (tmp_path / "out" / "value_head.safetensors").symlink_to("gone")
    with pytest.raises(InputError, match=r"value_head\.safetensors: is a link to gone, which is not there"):
        load_value_head(tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_found_by_trying(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "of").mkdir(parents=True)
    (tmp_path / "link").symlink_to("nowhere")
    wrong = ["file", "file/below", "full", "x" * 300, "a\0b", "/proc/nowhere/x"]
    for name in wrong:
        with pytest.raises(InputError, match=r"^--out: .*; choose another") as caught:
            check_new_folder("--out", tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^--out: ~/x begins with '~', which no shell has replaced; write the path"):
        check_new_folder("--out", Path("~/x"))
    with pytest.raises(InputError, match=r"^save_hf: .*; choose another"):
        save_hf("a\0b", *tiny_model())
    (tmp_path / "empty").mkdir()
    for name in ("new", "new/deep/er", "empty", "link", "full/new"):
        check_new_folder("--out", tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file", "full", "link", "of"]
    save_hf(tmp_path / "link", *tiny_model())
    assert (tmp_path / "nowhere" / "config.json").exists()
    if os.geteuid():
        (tmp_path / "full").chmod(0o500)
        with pytest.raises(InputError, match="Permission denied"):
            check_new_folder("--out", tmp_path / "full" / "new")
