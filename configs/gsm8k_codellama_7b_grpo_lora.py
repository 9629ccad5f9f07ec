"""CodeLlama-7B on GSM8K programs with GRPO and LoRA, on 8 chips of TPU v5e.

python -m reft_jax plan --config=configs/gsm8k_codellama_7b_grpo_lora.py --topology=v5e:2x4

It has not been run. Learning rates are those of adapters, above the paper's, which are for full training.
"""

from pathlib import Path

from reft_jax.config import load_config


def get_config():
    config = load_config(f"{Path(__file__).with_name('paper.py')}:gsm8k,python")
    config.name = "GSM8K programs, CodeLlama-7B, GRPO with LoRA"
    config.lora.rank, config.lora.alpha = 16, 32.0
    config.sft.learning_rate, config.rerank.learning_rate = 2e-4, 2e-5
    config.rl.learning_rate = config.self_train.learning_rate = 1e-5
    config.rl.algorithm, config.rl.samples = "grpo", 8
    config.rl.micro_batch, config.sft.micro_batch, config.rerank.micro_batch = 16, 8, 8
    config.mesh.update(data=-1, fsdp=2, tensor=4)
    return config
