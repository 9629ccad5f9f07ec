"""Tokenizers: a model's own, or a small one trained for the toy.

Text becomes ids without special tokens and without truncation; EOS is added where a row is built. Text that spells a
special token ("</s>") is encoded as ordinary text. `transformers` is imported inside functions: the import takes
seconds, and a mistake in the settings or the data should be reported before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_jax.model_folder import CONFIG, TOKENIZER_CONFIG, end_ids, read_settings, tokenizer_files, write_tokenizer
from reft_jax.types import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

EOS, PAD = "<eos>", "<pad>"
BYTES = 256
SPECIAL = tuple(f"{name}_token" for name in ("eos", "bos", "unk", "pad", "sep", "cls", "mask"))
# Words, pieces of snake_case names, single digits, punctuation, whitespace. A space belongs to the word after it.
SPLIT = r" ?\p{L}+|_\p{L}+| ?\d| ?[^\s\p{L}\d_]+|\s+(?!\S)|\s+"
# None begins with a space: Llama's classes and their files differ there, and only there, and no text of a run does it.
SAMPLES = (
    'Question:\nIf Ann has 12 Apples,\nhow  many?\nAnswer reasoning:\ndef solution():\n    """If Ann has 12 Apples,\n'
    'how  many?"""\n    a_1 = 12\n    return a_1',
    "1234567 is 12,345.67 + 3/4 of 50%, 1e-5 or $1000.",
    "Ann's brother HAS apples_total, café × ½; isn't it?\n\n\nNo.\n",
    "for x in y:\n\tif x:\n        x += [1]\r\n            return {x: -1}  # done\n\n",
)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face model folder on disk. Never uses the network, never runs code of the folder.

    Raises InputError if the folder or its tokenizer files are missing or broken, if the tokenizer needs its own code,
    if it has no EOS token, if transformers gives other ids than the tokenizer's own file, or if encoding and decoding
    change a program's text (some tokenizers drop newlines or indentation, some change to lower case).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a Hugging Face model folder (or gs://…)")
    own = own_reading(folder)
    tok = from_folder(folder)
    if not tok.is_fast:
        raise InputError(f"{folder}: {type(tok).__name__} has no fast form; save the tokenizer as tokenizer.json")
    if tok.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no EOS token; set eos_token in {TOKENIZER_CONFIG}")
    if own:
        check_class(tok, *own)
    if decode(tok, encode(tok, SAMPLES[0])) != SAMPLES[0]:
        raise InputError(f"{folder}: the tokenizer changes spaces, lines or letters of a program; use another model's")
    tok.read_from = folder
    tok.save_pretrained = partial(write_tokenizer, tok)
    return tok


def from_folder(folder: Path) -> PreTrainedTokenizerFast:
    """Load a folder's tokenizer with transformers. InputError if it needs code from the folder, or if loading fails."""
    settings, config = read_settings(folder / TOKENIZER_CONFIG), read_settings(folder / CONFIG)
    import transformers

    name = check_settings(settings, folder / TOKENIZER_CONFIG).get("tokenizer_class") or ""
    found = getattr(transformers, name, None) or getattr(transformers, name.removesuffix("Fast"), None)
    known = found is not None
    if known and not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)):
        raise InputError(
            f"{folder / TOKENIZER_CONFIG}: field 'tokenizer_class' is {name!r}, which is not a tokenizer; copy the "
            "model's own file"
        )
    maps = settings.get("auto_map"), config.get("auto_map")
    if not known and any(found.get("AutoTokenizer") if isinstance(found, dict) else found for found in maps):
        raise InputError(
            f"{folder / TOKENIZER_CONFIG}: field 'auto_map': tokenizer {name!r} needs code from the folder, which is "
            "never run; use a model whose tokenizer transformers has, or save this one as tokenizer.json alone"
        )
    # If there is only a sentencepiece model, transformers 5 guesses a tokenizer that lacks Llama's space before the
    # first word.
    only_model = not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file()
    general = found is transformers.PreTrainedTokenizerFast and (folder / "tokenizer.json").is_file() and not any(maps)
    if general and config.get("model_type") == "llama":
        kind = found  # as AutoTokenizer would, whose import takes a third of a second
    else:
        kind = transformers.LlamaTokenizer if only_model and not known else transformers.AutoTokenizer
    if kind is not found and config.get("model_type") and str(config["model_type"]) not in transformers.CONFIG_MAPPING:
        # AutoTokenizer asks for the model's class first, and a family of one's own has none in transformers.
        kind = found if known else kind if only_model else transformers.PreTrainedTokenizerFast
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # for a broken file the Rust library raises nothing more specific
        if os.path.lexists(folder / CONFIG):
            check_config(folder)
        reason, remedy = str(error).partition("\n")[0], "copy its files again"
        if not only_model and not (folder / "tokenizer.json").is_file():
            reason = "vocab.json and merges.txt do not say how text is split"
            remedy = f"copy the model's tokenizer.json there, or name its tokenizer_class in {TOKENIZER_CONFIG}"
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason}); {remedy}") from error


def check_settings(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of a tokenizer_config.json. InputError if a name or token has the wrong type."""
    for key in ("tokenizer_class", *SPECIAL):
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) and key in SPECIAL else value
        if value is not None and not isinstance(text, str):
            allowed = "a token, as text or as an object with 'content'" if key in SPECIAL else "the name of a class"
            raise InputError(f"{path}: field {key!r} is {value!r}; allowed: {allowed}, or null")
        if text == "" and key in ("eos_token", "unk_token"):  # transformers would use the id of unk_token
            raise InputError(f"{path}: field {key!r} is empty; write the token or remove the field")
    return settings


def check_config(folder: Path) -> None:
    """InputError if transformers cannot read config.json, which it reads before a tokenizer."""
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a wrong value of a field can raise anything
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder / CONFIG}: transformers cannot read it ({reason}); correct the field, or copy the model's own "
            "file"
        ) from None


def own_reading(folder: Path) -> tuple[Path, Callable[[str], list[int]]] | None:
    """The tokenizer's own file, and a function from text to ids that uses this file alone, not a transformers class.

    None for vocab.json and merges.txt, which do not hold all of a tokenizer. InputError if transformers can load none
    of the files, or if a file is not what its name says.
    """
    names = {path.name for path in tokenizer_files(folder)}
    for name in ("special_tokens_map.json", "added_tokens.json"):  # some classes read them
        read_settings(folder / name)
    if "tokenizer.json" in names:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        try:
            fast = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises nothing more specific
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{path}: the tokenizer cannot be loaded ({reason}); copy the file again, or install the version of "
                "`tokenizers` that wrote it"
            ) from None
        return path, lambda text: _encode(fast, [text])[0]
    if "tokenizer.model" in names:
        from sentencepiece import SentencePieceProcessor

        path = folder / "tokenizer.model"
        try:
            (pieces := SentencePieceProcessor()).LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise InputError(
                f"{path}: not a sentencepiece model, perhaps Meta's tiktoken file or a cut one; copy tokenizer.json of "
                "the model's Hugging Face folder there"
            ) from None
        return path, pieces.encode
    if not names >= {"vocab.json", "merges.txt"}:
        raise InputError(
            f"{folder}: neither tokenizer.json nor tokenizer.model in it; copy the model's tokenizer there"
            + ("; tekken.json is not read" if "tekken.json" in names else "")
        )
    return None


def check_class(tok: PreTrainedTokenizerFast, path: Path, read: Callable[[str], list[int]]) -> None:
    """Raise InputError unless transformers' class gives the same ids as `read`, which uses the tokenizer's own file."""
    for text in SAMPLES:
        ours, own = encode(tok, text), read(text)
        if ours != own:
            at = next(i for i, (a, b) in enumerate(zip_longest(ours, own)) if a != b)
            ours, own = (tok.convert_ids_to_tokens(ids[at : at + 3]) for ids in (ours, own))
            name = "PreTrainedTokenizerFast" if path.name == "tokenizer.json" else "LlamaTokenizer"
            raise InputError(
                f"{path}: the file reads {text[:20]!r}… as {own}, transformers' {type(tok).__name__} as {ours}; "
                f'if the model was trained with the file\'s ids, set "tokenizer_class": "{name}" in {TOKENIZER_CONFIG}'
            )


def check_vocabulary(tok: PreTrainedTokenizerFast, vocab_size: int, folder: str | Path) -> None:
    """Raise InputError if EOS, or an id that `encode` can return, has no embedding in the model.

    `encode` never returns a special token that was added after the vocabulary, as CodeLlama's `<FILL_ME>` or a `[PAD]`.
    """
    added = {index: token.content for index, token in tok.added_tokens_decoder.items()}
    given = [index for index in tok.backend_tokenizer.get_vocab(with_added_tokens=False).values() if index not in added]
    given += [index for index, text in added.items() if index < vocab_size or index in encode(tok, text)]
    highest = max([*given, tok.eos_token_id])
    if highest >= vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {highest}, the model's vocab_size is {vocab_size}; use the "
            "tokenizer that belongs to the model"
        )


def all_end_ids(tok: PreTrainedTokenizerFast, folder: Path) -> list[int]:
    """The ids that end a rollout: the tokenizer's EOS, which training appends, and the ids in the folder's settings."""
    return sorted({tok.eos_token_id, *end_ids(folder)})


def encode(tok: PreTrainedTokenizerFast, text: str, *, special: bool = False) -> list[int]:
    """The ids of the whole `text`, with no token added before or after it.

    A special token that `text` spells is ordinary text; with `special` it becomes its id. This bypasses the class in
    transformers: CodeLlama's class would cut a text at the word `<FILL_ME>`.
    """
    return _encode(tok.backend_tokenizer, [text], special)[0]


def encode_all(tok: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of every text, in half of its time."""
    return _encode(tok.backend_tokenizer, texts)


def _encode(backend: Tokenizer, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    backend.encode_special_tokens = not special
    backend.no_truncation()
    backend.no_padding()
    return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]  # fast: no offsets


def decode(tok: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of `ids`, without special tokens, with its spaces unchanged."""
    return tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with at most `vocab_size` ids: `<eos>` 0, `<pad>` 1, 256 bytes, then merges.

    Each digit is one id. Every string can be encoded, and decoding returns it unchanged. The result depends on the
    texts alone. Raises InputError if vocab_size is too small for the bytes and the special tokens.
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
    tok = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tok.save_pretrained = partial(write_tokenizer, tok)
    return tok
