"""Adapter folders: what is written and read, what is refused; PEFT loads ours and we load PEFT's, with equal logits."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import drawn, tiny_model

from reft_jax import load_hf, save_hf
from reft_jax.commands.convert_adapter import run_convert_adapter
from reft_jax.model.lora import Lora, abstract_adapter, joined, merged_model
from reft_jax.model.peft import read_peft, stacked, write_peft
from reft_jax.parallel.mesh import unboxed
from reft_jax.tasks.tokenizer import train_bpe
from reft_jax.train.state import abstract_params
from reft_jax.types import InputError

MODEL, BASE = tiny_model()
TOKENS = np.arange(14).reshape(2, 7) * 3 % 61


def made(rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> tuple[Lora, dict]:
    lora = Lora(rank, alpha, targets)
    shapes = unboxed(abstract_adapter(lora, abstract_params(MODEL)["lm"]))
    return lora, jax.tree.map(np.asarray, drawn(shapes, seed))


def logits(*adapters) -> np.ndarray:
    lm = BASE
    for lora, adapter in adapters:
        lm = merged_model(jax.tree.map(jnp.array, joined(lm, adapter, lora)))
    return np.asarray(jax.jit(lambda lm: MODEL.apply({"params": lm}, TOKENS))(lm))


ONE, TWO = made(3, 6.0, ("q", "k", "v", "o", "gate", "up", "down"), 1), made(2, 1.0, ("o", "v"), 2)


def test_a_folder_comes_back_as_it_was_under_pefts_names(tmp_path):
    write_peft(tmp_path / "adapter", MODEL.config, *ONE, base="me/base")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7  # layers, matrices of an adapter, targets
    names = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    assert tensors[names.format("A")].shape == (3, 24) and tensors[names.format("B")].shape == (32, 3)
    lora, adapter = read_peft(tmp_path / "adapter", MODEL.config, BASE["layers"])
    assert set(lora.targets) == set(ONE[0].targets) and (lora.rank, lora.alpha) == (3, 6.0)
    jax.tree.map(np.testing.assert_array_equal, adapter, ONE[1])
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["r"] == 3 and about["lora_alpha"] == 6 and about["target_modules"][0] == "q_proj"


def test_two_adapters_as_one_add_what_both_add():
    """The second is that of ReFT on the warm-up model, with other settings."""
    lora, _ = both = stacked([ONE, TWO])
    assert lora.rank == 5 and lora.scale == ONE[0].scale
    np.testing.assert_allclose(logits(both), logits(ONE, TWO), atol=1e-5)
    assert np.abs(logits(ONE, TWO) - logits(ONE)).max() > 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "field 'peft_type' is 'IA3'; allowed: 'LORA'"),
        ({"use_dora": True}, "field 'use_dora' is True, which is not computed here"),
        ({"rank_pattern": {"q_proj": 4}}, "field 'rank_pattern'"),
        ({"bias": "all"}, "field 'bias' is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "field 'init_lora_weights' is 'pissa_niter_4', which is not"),
        ({"init_lora_weights": "olora"}, "field 'init_lora_weights' is 'olora'"),
        ({"alora_invocation_tokens": [1, 2]}, "field 'alora_invocation_tokens' is [1, 2]"),
        ({"modules_to_save": ["lm_head"]}, "field 'modules_to_save' is ['lm_head']"),
        ({"of_a_later_peft": 16}, "field 'of_a_later_peft' is 16, which is not computed here"),
        ({"r": 4}, "tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has shape (3, 24)"),
        ({"r": 0}, "numbers > 0 are needed"),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path, change, words):
    write_peft(tmp_path / "adapter", MODEL.config, *ONE, base="me/base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as refused:
        read_peft(tmp_path / "adapter", MODEL.config, BASE["layers"])
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "target_modules": "all-linear"},
        {"init_lora_weights": False, "of_a_later_peft": None, "another": False, "a_third": {}, "bias": None},
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}, "peft_version": "9.0"},
    ],
    ids=["training", "off", "unused"],
)
def test_fields_that_change_nothing_are_allowed(tmp_path, change):
    write_peft(tmp_path / "adapter", MODEL.config, *ONE, base="me/base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    lora, adapter = read_peft(tmp_path / "adapter", MODEL.config, BASE["layers"])
    assert lora.rank == 3
    jax.tree.map(np.testing.assert_array_equal, adapter, ONE[1])


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="PEFT is not installed here")
def test_the_defaults_of_peft_are_allowed(tmp_path):
    """Every field that this version of PEFT writes."""
    pytest.importorskip("torch")
    from peft import LoraConfig

    write_peft(tmp_path / "adapter", MODEL.config, *ONE, base="me/base")
    path = tmp_path / "adapter" / "adapter_config.json"
    LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(tmp_path / "theirs")
    path.write_text((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert read_peft(tmp_path / "adapter", MODEL.config, BASE["layers"])[0].rank == 3


def test_tensors_that_are_missing_or_belong_to_something_else_are_refused(tmp_path):
    write_peft(tmp_path / "adapter", MODEL.config, *TWO, base="me/base")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = tensors.pop("base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight")
    save_file(tensors, path)
    with pytest.raises(InputError, match="layers.1.self_attn.o_proj.lora_B.weight is missing"):
        read_peft(tmp_path / "adapter", MODEL.config, BASE["layers"])
    tensors |= {"base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight": gone}
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": gone}, path)
    with pytest.raises(InputError, match="tensor base_model.model.lm_head.lora_A.weight is not part of an adapter"):
        read_peft(tmp_path / "adapter", MODEL.config, BASE["layers"])


def test_convert_adapter_writes_a_merged_folder(tmp_path):
    model, params = tiny_model(vocab_size=300)
    tokenizer = train_bpe(["a b c"], 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_hf(tmp_path / "base", model, params, tokenizer=tokenizer)
    write_peft(tmp_path / "adapter", model.config, *ONE, base="me/base")
    run_convert_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    _, found = load_hf(tmp_path / "out")
    lora, adapter = ONE
    expected = merged_model(jax.tree.map(jnp.array, joined(params, adapter, lora)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)


# --- PEFT itself

PEFT = """
import sys
import numpy as np, torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
base, ours, theirs, out = sys.argv[1:]
tokens = torch.arange(14).reshape(2, 7) * 3 % 61
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32).eval()
with torch.no_grad():
    loaded = PeftModel.from_pretrained(model(), ours).eval()(tokens).logits
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    made = get_peft_model(model(), config).eval()
    torch.manual_seed(0)
    for name, x in made.named_parameters():
        if "lora_B" in name:
            x.normal_(std=0.3)
    made.save_pretrained(theirs)
    np.savez(out, ours=loaded.numpy(), theirs=made(tokens).logits.numpy())
"""


@pytest.fixture
def python() -> str:
    """A Python that has PEFT: this one, or the one that REFT_TRANSFORMERS4 names."""
    if importlib.util.find_spec("peft"):
        return sys.executable
    if given := os.environ.get("REFT_TRANSFORMERS4"):
        return given
    pytest.skip("PEFT is not installed here")


def test_peft_loads_ours_and_we_load_pefts(python, tmp_path):
    save_hf(tmp_path / "base", MODEL, BASE)
    write_peft(tmp_path / "ours", MODEL.config, *ONE, base=str(tmp_path / "base"))
    paths = [tmp_path / name for name in ("base", "ours", "theirs", "logits.npz")]
    done = subprocess.run([python, "-c", PEFT, *map(str, paths)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    theirs = read_peft(tmp_path / "theirs", MODEL.config, BASE["layers"])
    assert theirs[0] == Lora(2, 3.0, ("q", "down"))
    found = np.load(tmp_path / "logits.npz")
    np.testing.assert_allclose(logits(ONE), found["ours"], atol=2e-5)
    np.testing.assert_allclose(logits(theirs), found["theirs"], atol=2e-5)
    assert np.abs(found["ours"] - found["theirs"]).max() > 0.1
