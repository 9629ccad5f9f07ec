"""The embedded default: a small synthetic task that runs the whole chain on the CPU of a laptop.

./launch/quickstart.sh
"""

from reft_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "reft_jax quickstart (toy)"
    config.model.path = config.data.train = config.data.dev = config.data.test = "toy"
    config.model.dtype = "float32"
    config.mesh.cpu_devices = 2
    config.data.pad_multiple = 32
    config.sft.update(
        epochs=16, warmup_epoch=10, batch_size=16, micro_batch=16, learning_rate=2.5e-3, weight_decay=0.01, max_len=128
    )
    config.sft.eval_every = 2
    config.rl.update(
        iterations=40, questions=128, micro_batch=16, minibatches=2, learning_rate=3e-4, lr_warmup=10, vf_coef=0.1
    )
    # At this size a random value head is unlearned after hundreds of updates; until then its noise hides all else.
    config.rl.update(value_init=0.0, max_prompt=96, max_len=128, eval_every=10, save_every=10)
    config.self_train.update(epochs=16, learning_rate=3e-4)
    config.sample.update(n=16, train_n=8, train_limit=800, max_len=128)
    config.rerank.update(epochs=3, batch_size=64, micro_batch=32, learning_rate=1e-3, max_len=128)
    config.executor.update(timeout_s=2.0)
    return config
