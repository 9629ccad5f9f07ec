"""Adapter folders of PEFT in and out: adapter_config.json and adapter_model.safetensors, without PEFT and torch.

PEFT has a pair of matrices per layer, lora_A [rank, in] and lora_B [out, rank], under the module's name.
"""

import math
from pathlib import Path

import numpy as np

from reft_jax.model.hf_folder import ADAPTER, check_is_folder
from reft_jax.model.llama import LORA_A, LORA_B
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.lora import Lora, inputs
from reft_jax.model.safetensors import DTYPES, map_tensor, read_header, write_json, write_tensors
from reft_jax.model_folder import check_new_folder, read_json, whole_folder
from reft_jax.types import InputError

WEIGHTS = "adapter_model.safetensors"
# Fields of adapter_config.json that change nothing of what is computed, whatever they are: who made it and how it was
# trained; settings of other fields; which modules were chosen, which the tensors say too.
FREE = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha "
    "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern megatron_config megatron_core "
    "loftq_config qalora_group_size".split()
)
NEUTRAL = (None, False, {}, [])  # with one of these any other field is off, also one that is not known here
ALLOWED = {"bias": ("none", None), "init_lora_weights": (True, False, "gaussian", None)}  # others change the base


def tensor_name(config: LlamaConfig, target: str, layer: int, end: str) -> str:
    """PEFT's name of a matrix of an adapter."""
    module = config.family.tensors["layers", target][0].format(layer).removesuffix(".weight")
    return f"base_model.model.{module}.{'lora_A' if end == LORA_A else 'lora_B'}.weight"


def module_name(config: LlamaConfig, target: str) -> str:
    """The last part of the module's name, as `target_modules` has it: q_proj."""
    return config.family.tensors["layers", target][0].removesuffix(".weight").rpartition(".")[2]


def stacked(adapters: list[tuple[Lora, dict]]) -> tuple[Lora, dict[str, np.ndarray]]:
    """One adapter that adds what several add together: their ranks are added up.

    `W + s₁ A₁B₁ + s₂ A₂B₂ = W + s₁ [A₁ A₂] [B₁; (s₂/s₁) B₂]`. Where one has no matrices, the others stand beside
    zeros.
    """
    first, rank = adapters[0][0], sum(lora.rank for lora, _ in adapters)
    targets = tuple(dict.fromkeys(name for lora, _ in adapters for name in lora.targets))
    whole = {}
    for name in targets:
        a, b = ([], [])
        like = next(arrays for lora, arrays in adapters if name in lora.targets)
        for lora, arrays in adapters:
            if name in lora.targets:
                a.append(np.asarray(arrays[name + LORA_A]))
                b.append(np.asarray(arrays[name + LORA_B]) * np.float32(lora.scale / first.scale))
            else:
                inner, outer = like[name + LORA_A].shape, like[name + LORA_B].shape
                a.append(np.zeros((*inner[:-1], lora.rank), np.float32))
                b.append(np.zeros((outer[0], lora.rank, *outer[2:]), np.float32))
        whole |= {name + LORA_A: np.concatenate(a, -1), name + LORA_B: np.concatenate(b, 1)}
    return Lora(rank, first.scale * rank, targets), whole


def write_peft(folder: Path, config: LlamaConfig, lora: Lora, adapter: dict[str, np.ndarray], base: str) -> None:
    """Writes an adapter folder that PEFT loads; whole or not at all. base: the model that it belongs to, for people.

    Raises InputError if `folder` is not empty or cannot be made.
    """
    check_new_folder("--out_dir", folder)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [module_name(config, name) for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {}
    for layer in range(config.num_layers):
        for name in lora.targets:
            a, b = adapter[name + LORA_A][layer], adapter[name + LORA_B][layer]
            tensors[tensor_name(config, name, layer, LORA_A)] = a.reshape(-1, lora.rank).T
            tensors[tensor_name(config, name, layer, LORA_B)] = b.reshape(lora.rank, -1).T
    with whole_folder(folder) as target:
        write_json(target / ADAPTER, about)
        layout = {name: (np.dtype(np.float32), x.shape) for name, x in tensors.items()}
        write_tensors(target / WEIGHTS, layout, tensors.values())


def read_peft(folder: str | Path, config: LlamaConfig, layers) -> tuple[Lora, dict[str, np.ndarray]]:
    """The adapter in a folder of PEFT, for a model of this config; `layers`: arrays with the shapes of its layers.

    Raises InputError if the folder holds another kind of adapter, or one of another model.
    """
    path = check_is_folder(folder) / ADAPTER
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{path}: field 'peft_type' is {raw.get('peft_type')!r}; allowed: 'LORA'")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or alpha <= 0:
        raise InputError(f"{path}: fields 'r' and 'lora_alpha' are {rank!r} and {alpha!r}; numbers > 0 are needed")
    for field in sorted(raw.keys() - FREE):
        if raw[field] not in ALLOWED.get(field, NEUTRAL):
            raise InputError(
                f"{path}: field {field!r} is {raw[field]!r}, which is not computed here; merge the adapter with peft: "
                "merge_and_unload(), then save_pretrained()"
            )
    stored, adapter = read_header(path.parent / WEIGHTS), {}
    ours = [path[1] for path in config.family.tensors if path[0] == "layers" and path[1] in layers]
    targets = tuple(name for name in ours if tensor_name(config, name, 0, LORA_A) in stored)
    for name in targets:
        shape, cut = layers[name].shape, 1 + inputs(name)
        for end, size in ((LORA_A, (*shape[1:cut], rank)), (LORA_B, (rank, *shape[cut:]))):
            parts = []
            theirs = (rank, math.prod(size[:-1])) if end == LORA_A else (math.prod(size[1:]), rank)
            for layer in range(shape[0]):
                tensor = tensor_name(config, name, layer, end)
                found = stored.pop(tensor, None)
                if found is None or found.shape != theirs or found.dtype not in DTYPES:
                    what = f"has shape {found.shape}, type {found.dtype}" if found else "is missing"
                    raise InputError(
                        f"{path.parent / WEIGHTS}: tensor {tensor} {what}; {theirs} is needed: is this the base of "
                        "the adapter, and does every layer have one?"
                    )
                parts.append(map_tensor(found).astype(np.float32).T.reshape(size))
            adapter[name + end] = np.stack(parts)
    if stored:
        raise InputError(
            f"{path.parent / WEIGHTS}: tensor {min(stored)} is not part of an adapter of a {config.family.name}'s "
            "layers; merge the adapter with peft: merge_and_unload(), then save_pretrained()"
        )
    if not targets:
        raise InputError(f"{path.parent / WEIGHTS}: holds no tensors; fetch it again")
    return Lora(rank, float(alpha), targets), adapter
