"""GSM8K programs on Qwen2.5-Coder-1.5B with LoRA, for the eight chips of TPU v5e of a Kaggle notebook.

    python -m reft_jax plan --config=configs/gsm8k_qwen_1_5b_lora.py --topology=v5e:2x4

It has not been run; `plan` says whether it fits, and how long an iteration takes at most. Few updates: the value head
begins at 0 and λ is 1, as in configs/real.py. Learning rates are those of adapters, above those of full training.
"""

from pathlib import Path

from reft_jax.config import load_config


def get_config():
    config = load_config(f"{Path(__file__).with_name('gsm8k_pods.py')}:Qwen2.5-Coder-1.5B")
    config.name = "GSM8K programs, Qwen2.5-Coder-1.5B with LoRA"
    config.lora.update(rank=16, alpha=32.0)
    config.data.dev_rows = 300
    config.sft.update(epochs=3, warmup_epoch=1, learning_rate=1e-4, max_len=512)
    config.rl.update(iterations=100, questions=128, micro_batch=32, minibatches=2, ppo_epochs=1, learning_rate=1e-5)
    config.rl.update(lam=1.0, vf_coef=0.1, value_init=0.0, max_len=512, eval_every=20, save_every=5)
    config.sample.update(n=8, train_n=4, train_limit=1000, max_len=512)
    config.rerank.update(epochs=1, learning_rate=2e-5, max_len=512)
    config.self_train.learning_rate = 1e-5
    return config
