"""Tokenizer folders in the forms that people have: CodeLlama as published, other classes, other files, broken files."""

import builtins
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from llama_tokenizers import (
    INFILL,
    published_config,
    published_json,
    sentencepiece_model,
    special_tokens_map,
    write_folder,
)
from test_tokenizer import PROGRAM_TAIL, QUESTION, TEXTS
from tiny import tiny_model

from reft_jax.model.hf_write import save_hf
from reft_jax.model_folder import check_ids
from reft_jax.run.inputs import checked_tokenizer
from reft_jax.tasks.prompts import make_prompter, rollout_prompt
from reft_jax.tasks.tokenizer import all_end_ids, check_vocabulary, decode, encode, load_tokenizer, train_bpe
from reft_jax.types import Completion, InputError

NEW = "    eggs_each = 1_200\n\tif x:\n        return {x: -3.5}  # 'café' ½\n\n\n"
SPELLED = f"a <FILL_ME> b, {INFILL[0]} c{INFILL[3]} [PAD] <PRE> <SUF> d <FILL_ME></s>"


def codellama(folder, *, infill=True, config=None) -> tuple:
    """A folder as codellama/CodeLlama-7b-hf (or, without infill pieces, -34b-hf) and the model's vocab_size."""
    text, size = published_json(TEXTS, infill=infill)
    extra = [INFILL[0], INFILL[2], INFILL[1], INFILL[3]]
    special = special_tokens_map(**{"additional_special_tokens": extra} if infill else {})
    config = published_config("CodeLlamaTokenizer") | (config or {})
    files = {"tokenizer.json": text, "tokenizer_config.json": config, "special_tokens_map.json": special}
    return write_folder(folder, files), size


SAVED_BY_4 = {
    "additional_special_tokens": INFILL,
    "prefix_token": INFILL[0],
    "suffix_token": INFILL[1],
    "middle_token": INFILL[2],
    "eot_token": INFILL[3],
    "fill_token": "<FILL_ME>",
    "use_default_system_prompt": False,
}


@pytest.mark.parametrize(
    ("infill", "config", "added"),
    [
        pytest.param(True, {}, ["<FILL_ME>"], id="7B and 13B"),
        pytest.param(False, {}, [*INFILL, "<FILL_ME>"], id="34B: the class adds all five"),
        pytest.param(True, SAVED_BY_4 | {"pad_token": "<s>"}, ["<FILL_ME>"], id="saved by the authors' training"),
        pytest.param(True, {"pad_token": "[PAD]"}, ["<FILL_ME>", "[PAD]"], id="padding added, nothing resized"),
        pytest.param(True, {"fill_token": None}, [], id="no fill token"),
    ],
)
def test_codellama_starts(tmp_path, infill, config, added):
    folder, size = codellama(tmp_path / "model", infill=infill, config=config)
    model, params = tiny_model(vocab_size=size)
    save_hf(tmp_path / "weights", model, params)
    for path in (tmp_path / "weights").iterdir():
        path.rename(folder / path.name)
    tok = checked_tokenizer(folder)
    assert type(tok).__name__ == "CodeLlamaTokenizer"
    assert {token for token, index in tok.get_vocab().items() if index >= size} == set(added)
    for text in (*TEXTS, SPELLED, *(f"a{token} b" for token in added), NEW[4:]):
        assert max(encode(tok, text)) < size
        assert decode(tok, encode(tok, text)) == text.replace("▁", " ")  # which is how pieces write a space


def test_an_id_that_text_can_give_must_be_in_the_model(tmp_path):
    folder, size = codellama(tmp_path)
    tok = load_tokenizer(folder)
    tok.add_special_tokens({"pad_token": "[PAD]"})
    check_vocabulary(tok, size, folder)
    tok.add_tokens(["wombat"])
    with pytest.raises(InputError, match=rf"ids up to {size + 2}, the model's vocab_size is {size}; use the tokenizer"):
        check_vocabulary(tok, size, folder)
    check_vocabulary(tok, size + 3, folder)
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(published_config("LlamaTokenizer", eos_token="<end>")))
    with pytest.raises(InputError, match=rf"ids up to {size}, "):  # training appends it
        check_vocabulary(load_tokenizer(folder), size, folder)


def test_a_class_that_reads_otherwise_than_the_file_is_refused(tmp_path):
    """Yi's kind: no space before the first word in tokenizer.json, which LlamaTokenizer puts there."""
    text, _ = published_json(TEXTS, prepend=False)
    files = {"tokenizer.json": text, "tokenizer_config.json": published_config("LlamaTokenizer")}
    with pytest.raises(InputError) as caught:
        load_tokenizer(write_folder(tmp_path, files))
    for part in ("tokenizer.json: the file reads 'Question:", " as ['Q", " LlamaTokenizer as ['▁Q"):
        assert part in str(caught.value)
    assert '"tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json' in str(caught.value)
    write_folder(tmp_path, {"tokenizer_config.json": published_config("PreTrainedTokenizerFast")})
    assert load_tokenizer(tmp_path).convert_ids_to_tokens(encode(load_tokenizer(tmp_path), "12")) == ["1", "2"]


@pytest.mark.parametrize("name", ["LlamaTokenizer", "CodeLlamaTokenizer", "LLaMATokenizer", None])
def test_a_sentencepiece_model_alone_gives_sentencepieces_ids(tmp_path, name):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model([*TEXTS, NEW] * 3))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}')
    if name:
        write_folder(tmp_path, {"tokenizer_config.json": published_config(name)})
    tok = load_tokenizer(tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (*TEXTS, NEW[4:], QUESTION, "12", "x\n\n  y"):
        assert encode(tok, text) == own.encode(text)
    assert tok.eos_token_id == own.eos_id() == 2
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    try:
        tok = load_tokenizer(tmp_path)
    except InputError as error:  # an older transformers leaves out the space before the first word
        assert re.search(r'tokenizer\.model: the file reads .*"tokenizer_class": "LlamaTokenizer"', str(error))
    else:
        assert encode(tok, QUESTION) == own.encode(QUESTION)


def test_vocab_and_merges_are_read_by_a_class_that_is_named(tmp_path):
    bpe = train_bpe(TEXTS, 300)
    spec = json.loads(bpe.backend_tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in spec["merges"])
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<eos>", "unk_token": "<eos>", "bos_token": "<eos>"}
    write_folder(tmp_path, {"vocab.json": spec["vocab"], "merges.txt": merges, "tokenizer_config.json": config})
    tok = load_tokenizer(tmp_path)
    assert decode(tok, encode(tok, TEXTS[0])) == TEXTS[0] and tok.eos_token_id == 0
    write_folder(tmp_path, {"tokenizer_config.json": config | {"tokenizer_class": "PreTrainedTokenizerFast"}})
    with pytest.raises(InputError, match=r"do not say how text is split\); copy the model's tokenizer\.json there, or"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["mine.Mine", None]}, {"AutoTokenizer": [None, "mine.Mine"]}])
def test_code_of_a_folder_is_never_run_and_never_asked_for(tmp_path, monkeypatch, where, auto_map):
    def asked(*args):
        raise AssertionError("it waits for an answer")

    monkeypatch.setattr(builtins, "input", asked)
    text, _ = published_json(TEXTS)
    files = {"tokenizer.json": text, "config.json": {"model_type": "llama"}}
    files["mine.py"] = (
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Mine\n"
    )
    files["tokenizer_config.json"] = published_config("Mine")
    files[where] |= {"auto_map": auto_map}
    with pytest.raises(InputError, match=r"field 'auto_map': tokenizer 'Mine' needs code from the folder.*; use a"):
        load_tokenizer(write_folder(tmp_path, files))
    write_folder(tmp_path, {"tokenizer_config.json": published_config("LlamaTokenizer", auto_map=auto_map)})
    assert load_tokenizer(tmp_path).eos_token_id == 2  # transformers' own class does without
    assert not (tmp_path / "ran").exists()


def lfs(folder):
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n")


def only(name, content):
    def change(folder):
        for path in folder.glob("tokenizer*"):
            path.unlink()
        (folder / name).write_bytes(content)

    return change


def dangle(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../../blobs/gone")


def as_folder(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()


def fields(**changes):
    def change(folder):
        write_folder(folder, {"tokenizer_config.json": published_config("LlamaTokenizer") | changes})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lfs, r"tokenizer\.json: is a git-lfs pointer, not the file; run `git lfs pull` in "),
        (dangle, r"tokenizer\.json: is a link to \.\./\.\./blobs/gone, which is not there; copy with "),
        (as_folder, r"tokenizer\.json: the tokenizer cannot be loaded .*; copy the file again"),
        (only("tokenizer.model", b"IQ== 0\nIg== 1\n"), r"tokenizer\.model: not a sentencepiece model, perhaps Meta's"),
        (only("tokenizer.model", b""), r"tokenizer\.model: not a sentencepiece model"),
        (only("tekken.json", b"{}"), r"neither tokenizer\.json nor tokenizer\.model in it; .*; tekken\.json is not"),
        (lambda folder: write_folder(folder, {"tokenizer_config.json": "[]"}), r"_config\.json: a JSON object is"),
        (lambda folder: write_folder(folder, {"tokenizer_config.json": "{"}), r"_config\.json: not JSON "),
        (fields(eos_token=""), r"tokenizer_config\.json: field 'eos_token' is empty; write the token or remove the"),
        (fields(eos_token=None), r"has no EOS token; set eos_token in tokenizer_config\.json"),
        (
            fields(eos_token=5),
            r"tokenizer_config\.json: field 'eos_token' is 5; allowed: a token, as",
        ),
        (
            fields(pad_token={"content": 5}),
            r"tokenizer_config\.json: field 'pad_token' is {'content': 5}; allowed: a ",
        ),
        (
            fields(bos_token=["<s>"]),
            r"tokenizer_config\.json: field 'bos_token' is \['<s>'\]; allowed: a token",
        ),
        (
            fields(tokenizer_class=5),
            r"tokenizer_config\.json: field 'tokenizer_class' is 5; allowed: the name of",
        ),
        (
            fields(tokenizer_class="AutoModel"),
            r"field 'tokenizer_class' is 'AutoModel', which is not a tokenizer; copy",
        ),
        (fields(tokenizer_class="LlamaForCausalLM"), r"'LlamaForCausalLM', which is not a tokenizer; copy"),
        (lambda folder: write_folder(folder, {"added_tokens.json": "{"}), r"added_tokens\.json: not JSON "),
        (lambda folder: write_folder(folder, {"special_tokens_map.json": ""}), r"special_tokens_map\.json: is empty; "),
        (
            lambda folder: write_folder(folder, {"config.json": {"model_type": "llama", "pretraining_tp": "x"}}),
            r"config\.json: transformers cannot read it \(.*'pretraining_tp'.*'x'.*\); correct the field, or copy",
        ),
        (fields(bos_token="", unk_token=""), r"tokenizer_config\.json: field 'unk_token' is empty; write"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path, change, words):
    text, _ = published_json(TEXTS)
    write_folder(tmp_path, {"tokenizer.json": text, "tokenizer_config.json": published_config("LlamaTokenizer")})
    load_tokenizer(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": 2}, None, [2]),
        ({"eos_token_id": [2, 7]}, None, [2, 7]),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 9]}, [2, 7, 9]),
        ({"eos_token_id": [5]}, {"eos_token_id": 7}, [2, 7]),  # as transformers: the first file that says it
        ({"eos_token_id": 5}, {"do_sample": True}, [2, 5]),
        ({"eos_token_id": None}, None, [2]),
        ({}, None, [2]),
    ],
)
def test_a_rollout_ends_at_the_tokenizers_eos_and_the_folders(tmp_path, config, generation, ids):
    files = {"config.json": config} | ({"generation_config.json": generation} if generation else {})
    assert all_end_ids(SimpleNamespace(eos_token_id=2), write_folder(tmp_path, files)) == ids


@pytest.mark.parametrize("wrong", ["2", 2.0, [2, "7"], True, {"a": 1}, [[2]]])
def test_end_ids_of_a_wrong_type_are_named(tmp_path, wrong):
    write_folder(tmp_path, {"generation_config.json": {"eos_token_id": wrong}})
    with pytest.raises(InputError, match=r"generation_config\.json: field 'eos_token_id' is .*; an id or a list of"):
        all_end_ids(SimpleNamespace(eos_token_id=2), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("eos_token_id", -1, r"has -1; allowed: 0 to 99, the ids of the model"),
        ("eos_token_id", [2, 100], r"has 100; allowed: 0 to 99, the ids of the model"),
        ("eos_token_id", 2**70, r"has 1180591620717411303424; allowed: 0 to 99, "),
        ("bos_token_id", "1", r"is '1'; allowed: an id or null"),
        ("pad_token_id", [0], r"is \[0\]; allowed: an id or null"),
    ],
)
def test_special_ids_are_ids_of_the_model(tmp_path, name, field, value, words):
    good = {"bos_token_id": 1, "eos_token_id": [2, 99], "pad_token_id": -1}  # Llama 1 has no padding, and says so
    check_ids(write_folder(tmp_path, {"config.json": good, "generation_config.json": good}), 100)
    write_folder(tmp_path, {name: good | {field: value}})
    with pytest.raises(InputError, match=rf"/{name}: field '{field}' {words}"):
        check_ids(tmp_path, 100)


def test_the_id_that_ended_a_completion_is_not_its_text():
    """Whichever it is: <|eot|> here is an ordinary token, which decoding does not skip."""
    bpe = train_bpe(TEXTS, 400)
    bpe.add_tokens(["<|eot|>"])
    prompt, eot = encode(bpe, rollout_prompt(QUESTION, "python")), bpe.convert_tokens_to_ids("<|eot|>")
    for last, finished in ((eot, True), (bpe.eos_token_id, True), (encode(bpe, "s")[-1], False)):
        tokens = np.array([*encode(bpe, PROGRAM_TAIL), last])
        text = make_prompter(bpe).completed(prompt, Completion("a", 0, tokens, tokens * 0.0, finished))
        assert text.endswith("return result" if finished else "return results")


def test_an_unreadable_file_is_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    text, _ = published_json(TEXTS)
    write_folder(tmp_path, {"tokenizer.json": text, "tokenizer_config.json": published_config("LlamaTokenizer")})
    (tmp_path / "tokenizer.json").chmod(0)
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read \(Permission denied\); check its owner"):
        load_tokenizer(tmp_path)
