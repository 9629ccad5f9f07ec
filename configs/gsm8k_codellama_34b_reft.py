"""CodeLlama-34B with the 7B row's settings, on the pod and with the mesh that `plan --search` chose: v5p:2x4x4. It has
not been run here; docs/pods.md has its plan.

    python -m reft_jax plan --config=configs/gsm8k_codellama_34b_reft.py --search \
        --topology=v5e:8x8,v5e:8x16,v5p:2x4x4,v5p:4x4x4,v6e:8x8
"""

from pathlib import Path

from reft_jax.config import load_config


def get_config():
    config = load_config(f"{Path(__file__).with_name('paper.py')}:gsm8k,python")
    config.name, config.model.path = "GSM8K programs, CodeLlama-34B", "models/CodeLlama-34b-hf"
    config.mesh.update(data=-1, fsdp=2, tensor=8)
    config.model.remat = "dots"
    return config
