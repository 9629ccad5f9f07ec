"""GSM8K programs on other models, with the settings of the paper's main row.

They have not been run here; `plan` says whether they fit:

    python -m reft_jax plan --config=configs/gsm8k_pods.py:Qwen2.5-Coder-7B --topology=v5e:4x8
    python -m reft_jax plan --config=configs/gsm8k_pods.py:Llama-3.1-8B --topology=v5e:4x8
    python -m reft_jax plan --config=configs/gsm8k_pods.py:Qwen2.5-Coder-1.5B --topology=v5e:2x4

The argument is a file of configs/models/ and the last part of `model.path`.
"""

from pathlib import Path

from reft_jax.config import load_config

# Axes of the mesh; the rest of the chips goes to data. `tensor` must divide the key-value heads: 4, 8 and 2 of them.
MESHES = {
    "Qwen2.5-Coder-7B": {"fsdp": 8, "tensor": 4},
    "Llama-3.1-8B": {"fsdp": 4, "tensor": 8},
    "Qwen2.5-Coder-1.5B": {"fsdp": 4, "tensor": 2},
}


def get_config(model="Qwen2.5-Coder-7B"):
    if model not in MESHES:
        raise ValueError(f"{model!r} is not one of {', '.join(MESHES)}")
    config = load_config(f"{Path(__file__).with_name('paper.py')}:gsm8k,python")
    config.name, config.model.path = f"GSM8K programs, {model}", f"models/{model}"
    config.mesh.update(data=-1, **MESHES[model])
    return config
