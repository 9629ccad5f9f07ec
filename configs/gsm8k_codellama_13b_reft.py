"""CodeLlama-13B with the 7B row's settings, on 64 chips of TPU v5p. It has not been run here; docs/pods.md has its
plan.

python -m reft_jax plan --config=configs/gsm8k_codellama_13b_reft.py --topology=v5p:4x4x4
"""

from pathlib import Path

from reft_jax.config import load_config


def get_config():
    config = load_config(f"{Path(__file__).with_name('paper.py')}:gsm8k,python")
    config.name, config.model.path = "GSM8K programs, CodeLlama-13B", "models/CodeLlama-13b-hf"
    config.mesh.update(data=2, fsdp=4, tensor=8)
    return config
