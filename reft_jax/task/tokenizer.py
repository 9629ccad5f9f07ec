"""Tokenizers: a model's own, or a small one trained on the spot.

Text becomes ids without special tokens and without truncation; EOS is added where a row is built. Text that happens to
spell a special token ("</s>") stays text. `transformers` is imported where it is used: it takes seconds, and a mistake
in the settings or the data should show before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reft_jax.task.prompts import rollout_prompt
from reft_jax.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS, PAD = "<eos>", "<pad>"
BYTES = 256
# Words, pieces of snake_case names, single digits, punctuation, whitespace; the space before a word belongs to it.
SPLIT = r" ?\p{L}+|_\p{L}+| ?\d| ?[^\s\p{L}\d_]+|\s+(?!\S)|\s+"


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face model folder on disk; never looks at the network.

    Raises InputError if the folder or its tokenizer files are missing or broken, if there is no EOS token, or if the
    tokenizer does not give a program's text back as it was (some drop newlines or indentation, some lower-case).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a Hugging Face model folder on disk")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise InputError(
            f"{folder}: neither tokenizer.json nor tokenizer.model in it; copy the model's tokenizer there"
        )
    from transformers import AutoTokenizer

    try:
        tok = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust library raises nothing more specific for a broken file
        reason = str(error).partition("\n")[0]
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason}); copy its files again") from error
    if tok.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    sample = rollout_prompt("If Ann has 12 Apples,\nhow  many?", "python") + "    a_1 = 12\n    return a_1"
    if decode(tok, encode(tok, sample)) != sample:
        raise InputError(f"{folder}: the tokenizer changes spaces, lines or letters of a program; use another model's")
    return tok


def check_vocabulary(tok: PreTrainedTokenizerFast, vocab_size: int, folder: str | Path) -> None:
    """Raise InputError if the tokenizer, added tokens included, can emit an id the model has no embedding for."""
    highest = max(tok.get_vocab().values())
    if highest >= vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {highest}, the model's vocab_size is {vocab_size}; use the "
            "tokenizer that belongs to the model"
        )


def encode(tok: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of `text`, all of it, with no special token before, after or within."""
    # verbose=False: rows over the length limit are dropped and counted elsewhere, with no warning for each
    return tok(
        text, add_special_tokens=False, split_special_tokens=True, truncation=False, padding=False, verbose=False
    )["input_ids"]


def encode_rollout(tok: PreTrainedTokenizerFast, question: str, engine: str) -> list[int]:
    """The ids that a rollout continues: one string, tokenized once, cut where the training rows have a cut too.

    Many byte-level tokenizers make one id of a newline and the indent after it, so that the last newline of the forced
    prefix is no id that training has seen there: the model then answers with a second `def solution():`. With those the
    newline is left to the model. Sentencepiece models (CodeLlama) keep it.
    """
    text = rollout_prompt(question, engine)
    ids = encode(tok, text)
    if engine == "python" and encode(tok, text + "    a")[: len(ids)] != ids:
        return encode(tok, text[:-1])
    return ids


def decode(tok: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens left out, spaces as they are."""
    return tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with at most `vocab_size` ids: `<eos>` 0, `<pad>` 1, 256 bytes, then merges.

    Digits stay single, so a number's ids are its digits. Every string can be encoded and comes back unchanged. The
    result depends on the texts alone. Raises InputError if vocab_size has no room for the bytes and the special tokens.
    """
    special = [EOS, PAD]
    if vocab_size < BYTES + len(special):
        raise InputError(f"vocab_size={vocab_size}: too small for byte-level BPE; use {BYTES + len(special)} or more")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
