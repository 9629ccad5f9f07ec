"""A model family from outside: a file of the user's and no line of the package."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import test_hf_write
from tiny import drawn, tiny_model

from reft_jax import __main__, load_hf, save_hf
from reft_jax.commands import convert_adapter, sweep
from reft_jax.config import check_config, default_config
from reft_jax.model.families import FAMILIES, LLAMA, use
from reft_jax.model.hf import read_config
from reft_jax.model.lora import Lora, abstract_adapter
from reft_jax.model.peft import write_peft
from reft_jax.model.safetensors import read_header
from reft_jax.parallel.mesh import unboxed
from reft_jax.plan.plan import shapes_of
from reft_jax.tasks.tokenizer import load_tokenizer, train_bpe
from reft_jax.train.state import abstract_params
from reft_jax.types import InputError, Stopped

# A Llama whose window is as long as its context, with ties by default, another name of epsilon and two of tensors.
MISTRAL_LIKE = """
import dataclasses
from reft_jax.model.config_fields import FLAG, Field
from reft_jax.model.families import LLAMA

MINE = dataclasses.replace(
    LLAMA,
    model_type="mistral_like",
    name="MistralLike",
    fields=LLAMA.fields | {"tie_word_embeddings": Field(FLAG, True)},
    renamed={"rms_norm_eps": "norm_eps"},
    refused={name: values for name, values in LLAMA.refused.items() if name != "sliding_window"},
    tensors=LLAMA.tensors
    | {
        ("final_norm",): ("model.last_norm.weight", 0),
        ("layers", "q"): ("model.layers.{}.self_attn.query.weight", 1),
    },
)
OTHER = 3
"""
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))


@pytest.fixture
def mine(tmp_path):
    """The family's name in a setting; forgotten at the end."""
    (tmp_path / "mine.py").write_text(MISTRAL_LIKE)
    yield f"{tmp_path}/mine.py:MINE"
    FAMILIES.pop("mistral_like", None)


@pytest.fixture
def folder(tmp_path, mine):
    """What `mistral_like` would publish, written by its own model, and that model's logits."""
    use(mine)
    model, params = tiny_model(tie_embeddings=True, rms_norm_eps=0.1)
    model = model.clone(config=dataclasses.replace(model.config, model_type="mistral_like"))
    save_hf(tmp_path / "model", model, params)
    config = tmp_path / "model" / "config.json"
    raw = json.loads(config.read_text())
    assert raw["model_type"] == "mistral_like" and raw["architectures"] == ["MistralLikeForCausalLM"]
    assert raw["norm_eps"] == 0.1 and "rms_norm_eps" not in raw
    del raw["tie_word_embeddings"]  # by default
    config.write_text(json.dumps(raw | {"sliding_window": 4096}))
    del FAMILIES["mistral_like"]
    return tmp_path / "model", jax.jit(model.apply)({"params": params}, TOKENS)


def test_a_family_of_ones_own_has_the_right_logits(folder, mine):
    path, logits = folder
    assert b"model.last_norm.weight" in (path / "model.safetensors").read_bytes()
    with pytest.raises(
        InputError,
        match="field 'model_type' is \"mistral_like\": this version computes llama, .* only.*model.family",
    ):
        load_hf(path)
    use(mine)
    model, params = load_hf(path)
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, TOKENS), logits)
    save_hf(path.parent / "again", model, params)
    assert read_config(path.parent / "again") == read_config(path) == model.config


def test_a_model_of_a_family_of_ones_own_is_exported_and_merged(mine, tmp_path, monkeypatch):
    """The number format is that of the base, whatever its tensors are called. transformers does not know this
    `model_type`, so the tokenizer is that of a folder without config.json."""
    use(mine)
    base = tmp_path / "base"
    train_bpe(["a b c"], 300).save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(test_hf_write, "load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(convert_adapter, "checked_tokenizer", lambda folder: tokenizer)
    model, params = tiny_model(vocab_size=300)
    model = model.clone(config=dataclasses.replace(model.config, model_type="mistral_like"))
    save_hf(base, model, params, tokenizer=tokenizer, dtype=np.float16)
    test_hf_write.exported(base, tmp_path / "out", monkeypatch)
    lora = Lora(2, 4.0, ("q",))
    adapter = drawn(unboxed(abstract_adapter(lora, abstract_params(model)["lm"])), 1)
    write_peft(tmp_path / "adapter", model.config, lora, jax.tree.map(np.asarray, adapter), "me/base")
    del FAMILIES["mistral_like"]
    merge = ["convert", "adapter", f"--in={tmp_path / 'adapter'}", f"--base={base}", f"--out_dir={tmp_path / 'merged'}"]
    with pytest.raises(InputError, match=r"'model_type'.*name its Family.*--family"):
        __main__.run_command(merge)
    __main__.run_command([*merge, f"--family={mine}"])
    for written in ("out", "merged"):
        header = read_header(tmp_path / written / "model.safetensors")
        assert header["model.layers.1.self_attn.query.weight"].dtype == "F16"


def test_solve_knows_the_family_of_a_folder(folder, mine):
    """The folder has no tokenizer: that is the next thing that is wrong."""
    ask = ["solve", "2 and 3?", f"--model={folder[0]}"]
    with pytest.raises(InputError, match="'model_type'"):
        __main__.run_command(ask)
    with pytest.raises(InputError, match="tokenizer"):
        __main__.run_command([*ask, f"--family={mine}"])
    for wrong, why in (("none.py:MINE", "there is no file"), (mine.replace("MINE", "OTHER"), "is not a Family")):
        with pytest.raises(InputError, match=f"^--family='{wrong}'.*{why}"):
            __main__.run_command([*ask, f"--family={wrong}"])


def test_the_family_that_solve_is_given_comes_before_that_of_the_run(folder, mine, tmp_path):
    stage, run = tmp_path / "models" / "sft", {"model.path": str(folder[0]), "model.family": mine}
    stage.mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(run))
    (tmp_path / "moved.py").write_text(MISTRAL_LIKE.replace("MistralLike", "MistralLikeMoved"))
    for flags, name in (((), "MistralLike"), ((f"--family={tmp_path / 'moved.py'}:MINE",), "MistralLikeMoved")):
        with pytest.raises(InputError):  # there is no tokenizer
            __main__.run_command(["solve", "2 and 3?", f"--model={stage}", *flags])
        assert FAMILIES["mistral_like"].name == name


def test_the_setting_is_read_where_a_model_is(folder, mine):
    path, _ = folder
    config = default_config()
    config.model.path, config.model.family = str(path), mine
    shapes, _ = shapes_of(config, path / "none.py")
    assert shapes.model_type == "mistral_like" and shapes.tie_embeddings


def test_a_sweep_knows_the_family_before_it_reads_a_model(folder, mine, tmp_path, monkeypatch):
    path, data = folder[0], tmp_path / "test.json"
    data.write_text(json.dumps([{"item_id": "gsm8k_1", "question": "What is 1 + 1?", "answer_value": "2"}]))
    config = default_config()
    config.model.path, config.model.family = str(path), mine
    config.data.train = config.data.test = str(data)
    read = []

    def open_sweep(config, workdir, models):
        read.append(read_config(models[0].model.base).model_type)
        raise Stopped("the test")

    monkeypatch.setattr(sweep, "open_sweep", open_sweep)
    with pytest.raises(Stopped):
        sweep.sweep(check_config(config), tmp_path / "run", str(path), "", False, ())
    assert read == ["mistral_like"]


def test_a_llama_stays_one(folder, mine, tmp_path):
    """Its refusals too: the window is one of the family's alone."""
    use(mine)
    save_hf(tmp_path / "llama", *tiny_model())
    path = tmp_path / "llama" / "config.json"
    assert read_config(tmp_path / "llama").family is LLAMA
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 4096}))
    with pytest.raises(InputError, match="'sliding_window' is 4096: a Llama has no such field"):
        read_config(tmp_path / "llama")


def test_what_is_not_a_family_is_one_line(mine):
    use("")
    with pytest.raises(InputError, match="OTHER' is not a Family of reft_jax/model/families.py"):
        use(mine.replace("MINE", "OTHER"))
    with pytest.raises(InputError, match="model.family='mistral' must be path.py:NAME"):
        use("mistral")
