"""Reads what a model folder holds: its tensors by their plain names, or one line that says what it is instead."""

import os
import re
from pathlib import Path

from reft_jax.model.config_fields import shown
from reft_jax.model.safetensors import DTYPES, INDEX, SINGLE, Stored, read_header
from reft_jax.model_folder import CONFIG, read_json
from reft_jax.types import InputError

ADAPTER = "adapter_config.json"
WRAPPER = "pretrained_model."  # prefix of a model saved inside TRL's value-head wrapper
MERGE = "merge it first: python -m reft_jax convert adapter --in=ADAPTER --base=BASE --out_dir=DIR"
# Tensors that other programs store and a Llama computes or does not use: rotation tables, causal masks, cache scales.
IGNORED = re.compile(
    r"rotary_emb\.(original_)?inv_freq$|rotary_emb\.(cos|sin)_cached$|self_attn\.(masked_)?bias$|\.(q|k|v|kv)_scale$"
)
HEADS = ("lm_head.", "score.", "v_head.")
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|weight_(scales?|scale_inv|scale_2|packed|zero_point|shape)"
    r"|input_scale|(weight|input)_global_scale|W_q|codebooks|codes|Qidxs)$|\.quant_state\."
)
_UNMERGED = re.compile(r"\.lora_[AB]\.|\.lora_(magnitude|embedding)|\.base_layer\.|\.modules_to_save\.")
_FUSED = re.compile(r"\.(qkv_proj|gate_up_proj|query_key_value|W_pack|wqkv)\.")
_METAS = re.compile(r"^tok_embeddings\.|\.attention\.w[qkvo]\.")
_TRUNK = r"(embed_tokens|norm|layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|\w+_layernorm))\.weight$"
_PLAIN, _BARE, _WRAPPED = re.compile(r"model\." + _TRUNK), re.compile(_TRUNK), re.compile(r"(.+?\.)(model\.)?" + _TRUNK)
_WRAPPERS = {
    "_orig_mod.": "left by torch.compile; save model._orig_mod",
    "module.": "left by DistributedDataParallel or DeepSpeed; save model.module",
    "_fsdp_wrapped_module.": "left by FSDP; save the model inside",
    "base_model.model.": "left by PEFT; save what merge_and_unload() returns",
    "language_model.": "the text part of a vision-language model; save that part alone",
    "model.language_model.": "the text part of a vision-language model; save that part alone",
}


def check_is_folder(folder: str | Path) -> Path:
    """Return the folder as a path. Raises InputError unless it is a folder that can be read."""
    path = Path(folder)
    if not str(folder) or os.path.isfile(path):
        raise InputError(
            f"{str(folder) or 'the empty path'}: not a folder; give a Hugging Face model folder (or gs://…)"
        )
    if not os.path.isdir(path):
        remedy = "give a Hugging Face model folder (or gs://…)"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            remedy += f", or fetch the hub's first: hf download {folder} --local-dir DIR"
        elif str(folder).startswith("~"):
            remedy += "; no shell has replaced '~', write the path out"
        raise InputError(f"{folder}: no such folder; {remedy}")
    try:
        os.listdir(path)
        os.stat(os.path.join(path, "."))  # a Path would drop the dot
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); check its owner and mode") from None
    return path


def read_raw_config(folder: str | Path) -> dict:
    """Return the folder's config.json as it is. The InputError for a missing one says what the folder is instead."""
    folder = check_is_folder(folder)
    if not os.path.lexists(folder / CONFIG):
        raise InputError(_without_config(folder))
    return read_json(folder / CONFIG)


def stored_in(folder: str | Path) -> dict[str, Stored]:
    """Return the tensors of a model folder by their plain names (`model.…`, `lm_head.weight`, …), sorted by name.

    Names without `model.` get it, as in transformers. Raises InputError if the folder holds something else than a
    model's weights: an adapter, quantized weights, names of another program or another layout.
    """
    folder = check_is_folder(folder)
    if os.path.lexists(folder / ADAPTER):
        raise InputError(_adapter(folder))
    stored = {name.removeprefix(WRAPPER): tensor for name, tensor in read_headers(folder).items()}
    _check_names(folder, stored)
    if not any(name.startswith("model.") for name in stored) and any(map(_BARE.match, stored)):
        stored = {name if name.startswith(HEADS) else f"model.{name}": tensor for name, tensor in stored.items()}
    return dict(sorted(stored.items()))


def read_headers(folder: Path) -> dict[str, Stored]:
    """Return every tensor of model.safetensors, or of the files in the index. Raises InputError if they disagree."""
    if os.path.lexists(folder / SINGLE):
        return read_header(folder / SINGLE)
    if not os.path.lexists(folder / INDEX):
        raise InputError(_without_weights(folder))
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: field 'weight_map' is missing or empty; fetch the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or os.path.isabs(file) or ".." in Path(file).parts:
            raise InputError(
                f"{index}: field 'weight_map' has {shown(file)} as the file of tensor {name}; allowed: the name of a "
                "file in the folder. Fetch the index again"
            )
    merged: dict[str, Stored] = {}
    for path in sorted({folder / file for file in weight_map.values()}):
        for name, stored in read_header(path).items():
            if name in merged:
                raise InputError(f"{stored.path}: tensor {name} is also in {merged[name].path.name}; remove one")
            merged[name] = stored
    for name, file in weight_map.items():  # a tensor that no file has may not be needed, as a tied output matrix
        if name in merged and merged[name].path != folder / file:
            raise InputError(
                f"{index}: says that tensor {name} is in {file}, but {merged[name].path.name} has it; fetch both again"
            )
    return merged


def why_missing(folder: str | Path, name: str) -> str:
    """What the index says about a tensor that no file has, for a message; empty if it says nothing."""
    if os.path.lexists(Path(folder) / SINGLE):
        return ""
    file = read_json(Path(folder) / INDEX)["weight_map"].get(name)
    return f" ({INDEX} says that it is in {file})" if file else ""


def _check_names(folder: Path, stored: dict[str, Stored]) -> None:
    """Raise InputError if names or types of tensors show that these are not plain weights; in a fixed order."""
    names = sorted(stored)
    for name in names:
        odd_type = name.endswith(".weight") and stored[name].dtype not in DTYPES
        if odd_type or _QUANTIZED.search(name):
            what = f"tensor {name} has type {stored[name].dtype}" if odd_type else f"there is a tensor {name}"
            raise InputError(
                f"{stored[name].path}: the weights are quantized ({_quantization(folder)}{what}); use the unquantized "
                "model"
            )
    for pattern, what in (
        (_UNMERGED, "of an adapter that is not merged; save what merge_and_unload() of peft returns"),
        (_METAS, "in Meta's own layout; use the folder in Hugging Face format"),
        (_FUSED, "of several matrices in one, another family's layout; use a Llama checkpoint"),
    ):
        if found := next(filter(pattern.search, names), None):
            raise InputError(f"{stored[found].path}: tensor {found} is {what}")
    if not any(map(_PLAIN.match, names)) and not any(map(_BARE.match, names)):
        for name in names:
            if wrapped := _WRAPPED.match(name):
                prefix = wrapped[1]
                how = _WRAPPERS.get(prefix, "left by a wrapper; save the model inside")
                raise InputError(f"{stored[name].path}: the tensors' names begin with '{prefix}' ({how})")


def _quantization(folder: Path) -> str:
    """What the folder says about its quantization, for a message."""
    raw = read_json(folder / CONFIG) if os.path.isfile(folder / CONFIG) else {}
    for field in ("quantization_config", "compression_config", "quantization"):
        if value := raw.get(field):
            method = value.get("quant_method", value) if isinstance(value, dict) else value
            return f"config.json's {field} says {shown(method)}; "
    files = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
    return next((f"there is a {name}; " for name in files if os.path.lexists(folder / name)), "")


def _adapter(folder: Path) -> str:
    base = shown(read_json(folder / ADAPTER).get("base_model_name_or_path"))
    if not any(os.path.lexists(folder / name) for name in (SINGLE, INDEX)):
        return f"{folder / ADAPTER}: the folder holds an adapter of {base}, not a whole model; {MERGE}"
    return f"{folder / ADAPTER}: an adapter next to whole weights; transformers would add it to them; {MERGE}"


def _without_config(folder: Path) -> str:
    """What a folder without config.json is."""
    if os.path.lexists(folder / ADAPTER):
        return _adapter(folder)
    snapshots = folder / "snapshots"
    if os.path.isdir(snapshots):
        inside = sorted(os.listdir(snapshots)) or ["(empty: fetch the model again)"]
        return f"{folder}: the hub's cache of a model; give the snapshot in it: {snapshots / inside[-1]}"
    names = sorted(os.listdir(folder))
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"{folder}: holds GGUF weights ({ggufs[0]}); use the model's folder with unquantized safetensors"
    if any(name.endswith(".pth") for name in names) or "params.json" in names:
        return f"{folder}: Meta's own files, not a Hugging Face folder; use the folder in Hugging Face format"
    if "_METADATA" in names or "manifest.ocdbt" in names:
        return f"{folder}: a stage's model, not a Hugging Face folder; write one with `python -m reft_jax export`"
    if inside := [name for name in names if os.path.isfile(folder / name / CONFIG)]:
        return f"{folder}: not a model, but it has folders of models; give one of them: {folder / inside[-1]}"
    return f"{folder / CONFIG}: the file is missing; is this the folder of a model?"


def _without_weights(folder: Path) -> str:
    """What a folder with neither weights nor index has instead."""
    names = sorted(os.listdir(folder))

    def first(pattern: str) -> str | None:
        return next((name for name in names if re.fullmatch(pattern, name)), None)

    if name := first(r"model-\d+-of-\d+\.safetensors"):
        return f"{folder}: has numbered files ({name}, …) but no {INDEX}; fetch that too"
    if name := first(r"pytorch_model.*\.bin(\.index\.json)?"):
        convert = f"python -m reft_jax convert weights --in={folder} --out_dir=DIR"
        return f"{folder}: has PyTorch files only ({name}), which are not read; convert them: {convert}"
    for pattern, what in (
        (r"adapter_model\..+", f"an adapter, not a whole model, and its {ADAPTER} is missing; {MERGE}"),
        (r".+\.gguf", "a GGUF file; use the model's folder with unquantized safetensors"),
        (r"consolidated.*|.+\.pth", "its publisher's own format; use the folder in Hugging Face format"),
        (
            r"global_step\d+|.*\.distcp|pytorch_model_fsdp.*",
            "a training checkpoint; save the model with save_pretrained",
        ),
        (r"tf_model.*\.h5|flax_model.*\.msgpack", "weights of TensorFlow or Flax; save them as safetensors"),
        (r"(?!value_head).+\.safetensors", f"a file of another name; if it is the whole model, rename it to {SINGLE}"),
    ):
        if name := first(pattern):
            return f"{folder}: no {SINGLE}, but {name}: {what}"
    return f"{folder}: neither {SINGLE} nor {INDEX}; fetch the weights too"
