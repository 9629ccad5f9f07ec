"""The same numbers as transformers: logits, losses, greedy text; and each side reads the other's folders."""

import itertools
import json
import tempfile

import jax
import numpy as np
import optax
import pytest
from tiny import tiny_config, tiny_model, tiny_policy, tiny_state

from reft_jax import load_hf, save_hf
from reft_jax.engine.generate import Engine
from reft_jax.model.hf import VALUE_HEAD_FILE, load_rerank_head, load_value_head
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.parallel.mesh import make_mesh
from reft_jax.tasks.prompts import make_prompter
from reft_jax.tasks.tokenizer import load_tokenizer
from reft_jax.train.batches import pad_tokens
from reft_jax.train.packing import Packing
from reft_jax.train.state import make_optimizer
from reft_jax.train.steps import make_step, rerank_logits, sft_loss
from reft_jax.types import Prompt

torch = pytest.importorskip("torch", reason="transformers computes with torch: pip install -e .[test]")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

TOKENS = np.array([[3, 14, 15, 9, 26, 53, 58, 9, 7, 9], [2, 7, 18, 28, 18, 28, 45, 9, 0, 60]], np.int32)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPE_SCALING = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", **LLAMA3},
}
ROWS = ([3, 14, 15, 9, 26, 53, 58, 9, 7, 9, 2], [2, 7, 18, 28, 18], [5, 60, 1, 1, 44, 9, 31, 2])  # right-padded later
PROMPT_LENS = (4, 1, 7)
NEAR_TIE = 1e-3  # top two logits closer than this: either token is a right answer


def random_torch_model(config: LlamaConfig, kind: str = "LlamaForCausalLM", **extra):
    """A transformers model whose weights, norms included, are far from their initial values."""
    torch.manual_seed(0)
    hf_config = transformers.LlamaConfig.from_dict(config.to_hf() | extra)
    model = getattr(transformers, kind)(hf_config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(float(weight.ndim == 1), 0.2)
    return model


def torch_logits(model, tokens=TOKENS, **inputs):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)), **inputs).logits.numpy()


def padded(rows):
    """Right-padded ids, and their mask for transformers."""
    tokens, lengths = pad_tokens(rows, 8)
    return tokens, lengths, torch.tensor(np.arange(tokens.shape[1])[None] < lengths[:, None])


@pytest.mark.parametrize("head_dim", [8, None], ids=["head_dim given", "head_dim derived"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parity_of_logits(tmp_path, tied, kv_heads, head_dim):
    """On random models over the whole grid; each test goes through every rope theta and scaling."""
    for number, (theta, scaling) in enumerate(itertools.product((1e4, 1e6), ROPE_SCALING.values())):
        config = tiny_config(
            tie_embeddings=tied,
            num_kv_heads=kv_heads,
            head_dim=head_dim or 6,
            rope_theta=theta,
            rope_scaling=tuple(sorted(scaling.items())) if scaling else None,
        )
        raw = {} if head_dim else {"head_dim": None}
        theirs = random_torch_model(config, **raw)
        theirs.save_pretrained(tmp_path / str(number))
        model, params = load_hf(tmp_path / str(number))
        assert model.config == config
        want = torch_logits(theirs)
        assert want.std() > 0.3
        np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, TOKENS), want, atol=2e-5)


def test_parity_of_a_folder_we_write(tmp_path):
    """Sharded, with an index; tied and untied."""
    for tied in (True, False):
        out = tmp_path / f"tied_{tied}"
        scaling = tuple(sorted(ROPE_SCALING["llama3"].items()))
        model, params = tiny_model(tie_embeddings=tied, rope_scaling=scaling)
        save_hf(out, model, params, max_shard_bytes=6000)
        assert len(list(out.glob("*.safetensors"))) > 2 and (out / "model.safetensors.index.json").exists()
        theirs, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())
        logits = jax.jit(model.apply)({"params": params}, TOKENS)
        np.testing.assert_allclose(torch_logits(theirs), logits, atol=2e-5)


def test_parity_of_a_tied_model_stored_with_and_without_its_output_matrix(tmp_path):
    theirs = random_torch_model(tiny_config(tie_embeddings=True))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    assert "lm_head.weight" not in tensors
    _, without = load_hf(tmp_path)
    safetensors_torch.save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    model, params = load_hf(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, without)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, TOKENS), torch_logits(theirs), atol=2e-5)


def test_parity_of_mixed_types_in_one_file_and_in_shards(tmp_path):
    theirs = random_torch_model(tiny_config())
    kinds = [torch.bfloat16, torch.float16, torch.float32]
    with torch.no_grad():
        for i, weight in enumerate(theirs.parameters()):  # what each type can hold: nothing is rounded on the way
            weight.copy_(weight.to(kinds[i % 3]))
    want = torch_logits(theirs)
    for size in ("1GB", "8KB"):
        folder = tmp_path / size
        theirs.save_pretrained(folder, max_shard_size=size)
        files = sorted(folder.glob("*.safetensors"))
        assert (len(files) == 1) == (size == "1GB")
        kind = {name: kinds[i % 3] for i, (name, _) in enumerate(theirs.named_parameters())}
        for path in files:
            tensors = {name: tensor.to(kind[name]) for name, tensor in safetensors_torch.load_file(path).items()}
            safetensors_torch.save_file(tensors, path)
        model, params = load_hf(folder)
        np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, TOKENS), want, atol=2e-5)


def test_parity_of_the_loss_and_gradient_of_an_sft_batch():
    """Loss: the mean over all target tokens of the batch. Rows of different lengths, in two micro-batches."""
    rows, prompt_lens = [*ROWS, [0]], [*PROMPT_LENS, 1]  # the last is filler: its one token is no target
    model, params = tiny_policy()
    optimizer = make_optimizer(optax.constant_schedule(1e-3), weight_decay=0.0, clip_norm=1.0)
    state, where = tiny_state(model, params, optimizer)
    step = make_step(sft_loss, model, optimizer, where)
    decisions = [len(row) - prompt for row, prompt in zip(rows, prompt_lens, strict=True)]
    size = {"max_len": 32, "micro_batch": 2, "micro_batches": 2, "multiple": 16}
    packing = Packing(rows, np.array(prompt_lens) - 1, decisions, **size)
    _, metrics = step(state, (packing.lines, packing.spread(1 / sum(decisions))), packing.count)

    theirs = to_transformers(model, params["lm"])
    tokens, _, mask = padded(ROWS)
    labels = torch.tensor(tokens, dtype=torch.int64)
    for row, (ids, prompt_len) in enumerate(zip(ROWS, PROMPT_LENS, strict=True)):
        labels[row, :prompt_len] = labels[row, len(ids) :] = -100
    loss = theirs(torch.tensor(tokens), attention_mask=mask, labels=labels).loss
    loss.backward()
    norm = torch.sqrt(sum((weight.grad**2).sum() for weight in theirs.parameters()))
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-4)


def to_transformers(model, lm, **heads):
    """Our model as theirs, through a folder."""
    with tempfile.TemporaryDirectory() as folder:
        save_hf(folder, model, lm, **heads)
        kind = "LlamaForSequenceClassification" if heads else "LlamaForCausalLM"
        theirs, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return theirs


def test_parity_of_the_reranker(tmp_path):
    """Their classifier reads the last token that is not padding, ours the last of a row's length."""
    model, params = tiny_policy("rerank_head")
    out = tmp_path / "out"
    save_hf(out, model, params["lm"], rerank_head=params["rerank_head"])
    theirs, info = transformers.LlamaForSequenceClassification.from_pretrained(
        out, output_loading_info=True, pad_token_id=0
    )
    assert not any(info.values()) and theirs.config.num_labels == 2
    tokens, lengths, mask = padded(ROWS)
    want = torch_logits(theirs, tokens, attention_mask=mask)
    size = {"max_len": 2 * max(lengths), "micro_batch": len(ROWS), "micro_batches": 1, "multiple": 8}
    packing = Packing(ROWS, lengths - 1, np.ones_like(lengths), **size)
    loaded, trunk = load_hf(out, reranker=True)
    assert trunk.keys() == {"embed", "layers", "final_norm"}
    again = {"lm": trunk, "rerank_head": load_rerank_head(out)}
    for ours in (params, again):
        logits = rerank_logits(loaded, ours, jax.tree.map(lambda x: x[0], packing.lines))
        found = [packing.collect(logits[None, ..., i], tokens.shape[1])[packing.at] for i in (0, 1)]
        np.testing.assert_allclose(np.stack(found, -1), want, atol=2e-5)
    assert want.std() > 0.3


def test_parity_of_the_value_head_with_trl(tmp_path):
    """TRL keeps it as `v_head.summary`, a torch.nn.Linear on the last hidden state after the final norm."""
    model, params = tiny_policy()
    save_hf(tmp_path / "out", model, params["lm"], value_head=params["value_head"])
    stored = safetensors_torch.load_file(tmp_path / "out" / VALUE_HEAD_FILE)
    theirs = torch.nn.Linear(model.config.hidden_size, 1)
    theirs.load_state_dict({name.removeprefix("v_head.summary."): tensor for name, tensor in stored.items()})
    trunk = transformers.LlamaModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        want = theirs(trunk(torch.tensor(TOKENS)).last_hidden_state)[..., 0].numpy()
    loaded, lm = load_hf(tmp_path / "out")
    head = load_value_head(tmp_path / "out")
    hidden = loaded.apply({"params": lm}, TOKENS, method="hidden")
    np.testing.assert_allclose(hidden @ head["weight"] + head["bias"], want, atol=2e-5)


# --- Real weights: SmolLM2-135M, GSM8K prompts


@pytest.fixture(scope="module")
def real(smollm2, shared):
    """(their model, ours, our parameters, tokenizer, the prompts of 50 questions)."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    model, params = load_hf(smollm2)
    tokenizer = load_tokenizer(smollm2)
    lines = (shared / "data" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    prompts = [make_prompter(tokenizer).prompt(json.loads(line)["question"]) for line in lines]
    return theirs, model, params, tokenizer, prompts


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.long)])
def test_parity_of_smollm2_logits(real, capsys, count):
    theirs, model, params, _, prompts = real
    apply, clear, largest = jax.jit(model.apply), [], 0.0
    for start in range(0, count, 5):
        tokens, lengths, mask = padded(sorted(prompts[:count], key=len)[start : start + 5])
        ours = np.asarray(apply({"params": params}, np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % 64)))))
        want = torch_logits(theirs, tokens, attention_mask=mask)
        for row, length in enumerate(lengths):
            clear.append(compare_logits(ours[row, :length], want[row, :length]))
            largest = max(largest, np.abs(ours[row, :length] - want[row, :length]).max())
    with capsys.disabled():
        print(f"\n[SmolLM2-135M: largest difference of the logits of {count} prompts {largest:.1e}]")
    assert np.concatenate(clear).mean() > 0.99  # of all positions: which of them are near ties differs between CPUs


def compare_logits(ours, want) -> np.ndarray:
    """bool[T]: where the first choice is clear, and there both have the same one."""
    assert np.abs(ours - want).max() <= 2e-3
    top = np.sort(want, -1)
    clear = top[:, -1] - top[:, -2] >= NEAR_TIE
    np.testing.assert_array_equal(ours.argmax(-1)[clear], want.argmax(-1)[clear])
    return clear


@pytest.mark.parametrize(("count", "new"), [(10, 16), pytest.param(50, 64, marks=pytest.mark.long)])
def test_parity_of_smollm2_greedy_text(real, capsys, count, new):
    """`new` tokens from each of `count` prompts: our engine, and their `generate` with left padding."""
    theirs, model, params, tokenizer, prompts = real
    eos, ties = tokenizer.eos_token_id, 0
    engine = Engine(model, make_mesh(1, 1, 1), slots=10, pad_multiple=64, eos_id=eos, seed=0)
    for start in range(0, count, 10):  # prompts of like length together: the engine's limit is that of the whole row
        rows = sorted(prompts[:count], key=len)[start : start + 10]
        longest = len(rows[-1])
        asked = [Prompt(f"gsm8k_{i}", 0, np.array(ids, np.int32)) for i, ids in enumerate(rows)]
        ours = dict(engine.generate(params, asked, max_len=longest + new, temperature=0.0))
        left = np.zeros((10, longest), np.int64)
        for row, ids in zip(left, rows, strict=True):
            row[longest - len(ids) :] = ids
        mask = torch.tensor(np.arange(longest)[None] >= longest - np.array([[len(ids)] for ids in rows]))
        with torch.no_grad():
            want = theirs.generate(
                torch.tensor(left), attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
            )[:, longest:].numpy()
        ties += sum(
            differ_at_a_tie(theirs, ids, ours[i].tokens[:new], until(want[i], eos)) for i, ids in enumerate(rows)
        )
    with capsys.disabled():
        print(f"\n[greedy parity: {count - ties} of {count} prompts identical, {ties} up to a near tie]")
    assert ties <= count // 10


def differ_at_a_tie(theirs, prompt, ours, expected) -> bool:
    """Whether they differ, which they may only from a token on where the reference's top two logits are a near tie."""
    shared = min(len(ours), len(expected))
    differ = np.nonzero(ours[:shared] != expected[:shared])[0]
    if not differ.size:
        assert len(ours) == len(expected)
        return False
    logits = torch_logits(theirs, np.array([[*prompt, *expected[: differ[0]]]]))[0, -1]
    best, second = np.sort(logits)[:-3:-1]
    assert best - second < NEAR_TIE, f"token {differ[0]} of {len(prompt)} given: {best} against {second}"
    return True


def until(tokens, eos_id: int):
    """The tokens up to the first EOS, EOS included."""
    ends = np.nonzero(tokens == eos_id)[0]
    return tokens[: ends[0] + 1] if ends.size else tokens
