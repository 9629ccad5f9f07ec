"""Text to ids and back, for our byte-level tokenizer and for one of the sentencepiece kind (Llama's)."""

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_tokenizers import llama_tokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reft_jax.tasks.prompts import completion_text, prompt_text, rollout_prompt
from reft_jax.tasks.tokenizer import check_vocabulary, decode, encode, encode_all, load_tokenizer, train_bpe
from reft_jax.types import InputError

QUESTION = "Ann has 12 apples and gets 30 more.\nHow many?"
PROGRAM_TAIL = "    num_apples = 12 + 30\n    result = num_apples\n    return result"
TEXTS = [rollout_prompt(QUESTION, "python") + PROGRAM_TAIL] * 3 + ["Ann sells 25 of 190 big_red_apples, 7 remain. "]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, 400)


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=llama_tokenizer(TEXTS), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def folder(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    return tmp_path


@settings(deadline=None, max_examples=150)
@given(text=st.text() | st.text(alphabet=" \n\t_aB1.</s>eo½é漢\u200d🦆"))
def test_any_text_comes_back(bpe, text):
    assert decode(bpe, encode(bpe, text)) == text


def test_text_of_every_script_comes_back(bpe):
    for start in range(0, 0x110000, 0x4000):
        codes = range(start, start + 0x4000, 7)
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)  # surrogates are no characters
        assert decode(bpe, encode(bpe, text)) == text


def test_digits_stay_single(bpe):
    assert len(encode(bpe, "1234567")) == 7
    assert encode(bpe, "x1230")[-4:] == [encode(bpe, digit)[0] for digit in "1230"]
    digits = [piece for piece in (decode(bpe, [index]) for index in range(len(bpe))) if any(map(str.isdigit, piece))]
    assert max(len(piece.strip()) for piece in digits) == 1


def test_training_depends_on_the_texts_alone(bpe):
    again = train_bpe(TEXTS[::-1], 400)
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()
    assert (bpe.eos_token, bpe.eos_token_id, bpe.pad_token, bpe.pad_token_id) == ("<eos>", 0, "<pad>", 1)


def test_words_are_merged_and_the_size_is_kept(bpe):
    assert len(bpe) <= 400
    assert len(train_bpe(TEXTS, 258)) == 258  # no merges, still every byte
    assert len(encode(bpe, TEXTS[0])) < len(TEXTS[0]) / 3
    with pytest.raises(InputError, match="vocab_size=257: .*use 258 or more"):
        train_bpe(TEXTS, 257)


def test_a_saved_folder_loads_to_the_same_ids(bpe, folder):
    # a model's config.json in the same folder must not make transformers build a Llama tokenizer from our vocabulary
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}')
    loaded = load_tokenizer(folder)
    for text in (*TEXTS, "  naïve\r\n\ttabs 🦆 <eos>", ""):
        assert encode(loaded, text) == encode(bpe, text)
    assert loaded.eos_token_id == bpe.eos_token_id
    assert loaded.get_vocab() == bpe.get_vocab()
    auto = AutoTokenizer.from_pretrained(folder)  # which is not asked, because its import is slow
    assert type(loaded) is type(auto) and loaded.backend_tokenizer.to_str() == auto.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == auto.special_tokens_map


@pytest.mark.parametrize("named", [True, False])
def test_a_family_of_ones_own_has_a_model_type_that_transformers_does_not_know(bpe, folder, named):
    (folder / "config.json").write_text(json.dumps({"model_type": "mine"}))
    if not named:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["tokenizer_class"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert encode(load_tokenizer(folder), "1 + 2 = 3\n") == encode(bpe, "1 + 2 = 3\n")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=40)))
def test_texts_together_have_the_ids_that_each_has_alone(bpe, sentencepiece, texts):
    for tok in (bpe, sentencepiece):
        texts = [*texts, *TEXTS, "a <eos> b</s>"]
        found = encode_all(tok, texts)
        alone = [tok.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        assert found == alone


def test_special_tokens_in_a_text_are_text(bpe, sentencepiece):
    for tok, text in ((bpe, "a <eos> b<pad>"), (sentencepiece, "a <s> b</s>")):
        ids = encode(tok, text)
        assert not set(ids) & set(tok.all_special_ids)
        assert decode(tok, ids) == text


def test_no_special_token_is_added_and_those_sampled_are_skipped(sentencepiece):
    ids = encode(sentencepiece, "How many apples?")
    assert sentencepiece("How many apples?")["input_ids"][0] == sentencepiece.bos_token_id  # it would, if not told
    assert sentencepiece.bos_token_id not in ids
    ended = [sentencepiece.bos_token_id, *ids, sentencepiece.eos_token_id]
    assert decode(sentencepiece, ended) == "How many apples?"


def test_spaces_before_punctuation_stay(bpe, sentencepiece):
    text = "how many ? he 's got 2 . 5 , or n't"  # SVAMP writes like this, and "clean-up" would join it
    for tok in (bpe, sentencepiece):
        assert decode(tok, encode(tok, text)) == text


def test_a_long_text_is_neither_cut_nor_warned_about(bpe, folder, caplog):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 8}))
    loaded = load_tokenizer(folder)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert encode(loaded, TEXTS[0]) == encode(bpe, TEXTS[0])
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.text == ""


def test_sentencepiece_needs_prompt_and_response_in_one_piece(sentencepiece, tmp_path):
    sentencepiece.save_pretrained(tmp_path)
    tok = load_tokenizer(tmp_path)
    prompt = rollout_prompt(QUESTION, "python")
    prompt_ids, row_ids = encode(tok, prompt), encode(tok, prompt + PROGRAM_TAIL)
    response_ids = row_ids[len(prompt_ids) :]
    assert row_ids[: len(prompt_ids)] == prompt_ids
    assert decode(tok, response_ids) == PROGRAM_TAIL[1:]  # alone it loses a space of indent: no valid program
    program = completion_text(decode(tok, prompt_ids + response_ids))
    compile(program, "program", "exec")
    assert prompt_text(QUESTION) + program == prompt + PROGRAM_TAIL


def test_vocabulary_must_fit_the_model(bpe):
    check_vocabulary(bpe, len(bpe), "folder")
    with pytest.raises(InputError, match=f"folder: .*ids up to {len(bpe) - 1}, .*vocab_size is {len(bpe) - 1}"):
        check_vocabulary(bpe, len(bpe) - 1, "folder")
    larger = train_bpe(TEXTS, 300)
    larger.add_tokens(["<extra>"])
    with pytest.raises(InputError, match="ids up to 300"):
        check_vocabulary(larger, 300, "folder")


def test_missing_and_broken_folders(folder, tmp_path_factory):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_tokenizer(folder / "nowhere")
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path_factory.mktemp("empty"))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(InputError, match="the tokenizer cannot be loaded") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no EOS token; set eos_token"):
        load_tokenizer(folder)


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.Replace("\n", " "), normalizers.Strip()])
def test_a_tokenizer_that_changes_programs_is_refused(folder, normalizer):
    tok = AutoTokenizer.from_pretrained(folder)
    tok.backend_tokenizer.normalizer = normalizer
    tok.save_pretrained(folder)
    if isinstance(normalizer, normalizers.Strip):  # touches the ends alone, which no prompt has spaces at
        load_tokenizer(folder)
    else:
        with pytest.raises(InputError, match="changes spaces, lines or letters"):
            load_tokenizer(folder)


def test_a_real_tokenizer(smollm2):
    tok = load_tokenizer(smollm2)
    check_vocabulary(tok, 49152, smollm2)
    assert decode(tok, encode(tok, TEXTS[0])) == TEXTS[0]
    assert tok.bos_token_id not in encode(tok, "How many?")
