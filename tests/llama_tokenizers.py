"""Makes tokenizer folders of Llama's kind, with the fields of the published ones."""

import io
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

MARKS = ["<unk>", "<s>", "</s>"]
INFILL = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]


def llama_tokenizer(texts: list[str], vocab_size: int = 500) -> Tokenizer:
    """Llama's construction: a leading "▁" for the space before the first word, bytes for what is unknown."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=MARKS + byte_tokens, show_progress=False)
    tok.train_from_iterator([text.replace("\n", " ") for text in texts], trainer)
    spec = json.loads(tok.to_str())  # the trainer can only add the bytes as special tokens; Llama's are ordinary ones
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in MARKS]
    tok = Tokenizer.from_str(json.dumps(spec))
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))])
    return tok


def published_json(texts: list[str], *, infill: bool = False, prepend: bool = True) -> tuple[str, int]:
    """A tokenizer.json as Llama-2's, with CodeLlama's infill pieces, or without the first space (Yi); and its size."""
    spec = json.loads(llama_tokenizer(texts).to_str())
    spec["pre_tokenizer"], vocab = None, spec["model"]["vocab"]
    if infill:
        for piece in INFILL:
            vocab[piece] = len(vocab)
            spec["added_tokens"].append(spec["added_tokens"][0] | {"id": vocab[piece], "content": piece})
    if not prepend:
        del spec["normalizer"]["normalizers"][0], spec["decoder"]["decoders"][-1]
    return json.dumps(spec), len(vocab)


def published_config(name: str, **changes) -> dict:
    """tokenizer_config.json as codellama/CodeLlama-7b-hf has it, but for the class and `changes`."""

    def added(text: str) -> dict:
        one = {"__type": "AddedToken", "content": text, "lstrip": False, "normalized": True}
        return one | {"rstrip": False, "single_word": False}

    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": added("<s>"),
        "clean_up_tokenization_spaces": False,
        "eos_token": added("</s>"),
        "legacy": None,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": name,
        "unk_token": added("<unk>"),
    } | changes


def special_tokens_map(**more) -> dict:
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    named = zip(("unk_token", "bos_token", "eos_token"), MARKS, strict=True)
    return {name: {"content": text} | plain for name, text in named} | more


def write_folder(folder: Path, files: dict[str, str | dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def sentencepiece_model(texts: list[str], vocab_size: int = 360) -> bytes:
    """A tokenizer.model as Llama's: BPE, single digits, bytes for what is unknown."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_writer=made,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return made.getvalue()
