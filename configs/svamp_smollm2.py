"""SVAMP programs on SmolLM2-135M, small enough for two CPU cores in an hour and a half.

    python -m reft_jax pipeline --config=configs/svamp_smollm2.py --workdir=runs/svamp \
        --config.model.path=$MODEL_DIR/SmolLM2-135M --config.data.train=$DATA_DIR/svamp_python_sdp.json \
        --config.data.test=$DATA_DIR/svamp_test_set.json

Shorter than the paper: the short questions among 1,000 training rows (60 of them choose checkpoints); 3 epochs of SFT,
the second as warm-up, at a learning rate for small models; 50 PPO iterations of 32 questions, each with one pass of two
updates; 60 test questions; 4 samples for voting. The value head begins at 0, because with so few updates a random one
would be noise to the policy until the end. docs/results.md lists every run.

    python -m reft_jax pipeline --baselines --config=configs/svamp_smollm2.py:baselines --workdir=runs/baselines

with the paths above compares SFT, offline self-training, online self-training and ReFT: 100 test questions, 16 samples
per question, a reranker per model, 24 iterations of online self-training and of ReFT, and 16 samples of each of 80
training questions for offline self-training and the rerankers. docs/results.md says how long that took.
"""

from reft_jax.config import default_config


def get_config(variant=""):
    if variant not in ("", "baselines"):
        raise ValueError(f"variant {variant!r} is not known; the only variant is 'baselines'")
    config = default_config()
    config.name = "SVAMP programs, SmolLM2-135M"
    config.model.path = "runs/models/SmolLM2-135M"
    config.model.dtype = "float32"
    config.model.remat = "none"  # a tenth faster than "full" (docs/performance.md)
    config.data.train = "data/svamp_python_sdp.json"
    config.data.test = "data/svamp_test_set.json"
    config.data.update(dev_rows=60, train_limit=1000, test_limit=60, max_dropped=0.8, pad_multiple=32)
    config.sft.update(epochs=3, warmup_epoch=2, batch_size=16, micro_batch=8, learning_rate=5e-5, max_len=128)
    config.rl.update(iterations=50, questions=32, micro_batch=8, ppo_epochs=1, minibatches=2, learning_rate=1e-5)
    # While V is near 0, λ 0.95 gives the first of 34 to 49 tokens 18 to 9 % of the reward; rl.lam=1 would give it all.
    config.rl.update(vf_coef=0.1, value_init=0.0, max_prompt=80, max_len=128, eval_every=25, save_every=5)
    config.sample.update(n=4, train_n=4, train_limit=24, max_len=256)
    config.engine.slots = 64
    config.rerank.update(epochs=1, batch_size=16, micro_batch=8, learning_rate=2e-5, max_len=224)
    config.self_train.update(epochs=3, updates=2, learning_rate=1e-5)
    config.executor.update(timeout_s=5.0)
    if variant == "baselines":
        config.name += ", with baselines"
        config.data.test_limit = 100
        config.rl.update(iterations=24, eval_every=12)
        config.sample.update(n=16, train_n=16, train_limit=80)
    return config
