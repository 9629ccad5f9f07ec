"""CodeLlama-13B with the 7B row's settings, on 64 chips of TPU v5p. Not run here; docs/pods.md has its plan.

python -m reft_jax plan --config=configs/gsm8k_codellama_13b_reft.py --topology=v5p:4x4x4
"""

from reft_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "GSM8K programs, CodeLlama-13B"
    config.model.path = "models/CodeLlama-13b-hf"
    config.data.train = "data/gsm8k_python_sdp.json"
    config.data.test = "data/gsm8k_test_set.json"
    config.mesh.update(data=2, fsdp=4, tensor=8)
    return config
