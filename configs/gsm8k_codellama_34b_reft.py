"""CodeLlama-34B with the 7B row's settings, on the pod that `plan --search` picks. Not run here; docs/pods.md has its
plan.

    python -m reft_jax plan --config=configs/gsm8k_codellama_34b_reft.py --search \
        --topology=v5e:8x8,v5e:8x16,v5p:2x4x4,v5p:4x4x4,v6e:8x8
"""

from reft_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "GSM8K programs, CodeLlama-34B"
    config.model.path = "models/CodeLlama-34b-hf"
    config.data.train = "data/gsm8k_python_sdp.json"
    config.data.test = "data/gsm8k_test_set.json"
    config.mesh.update(data=-1, fsdp=4, tensor=8)
    return config
