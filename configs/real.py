"""The paper's comparison on a real code model: Qwen2.5-Coder-Instruct, de-quantized from 4 bits.

    python -m reft_jax pipeline --baselines --config=configs/real.py:svamp,0.5b --workdir=runs/svamp-0.5b \
        --config.model.path=$MODEL_DIR/Qwen2.5-Coder-0.5B-Instruct \
        --config.data.train=$DATA_DIR/svamp_python_sdp.json --config.data.test=$DATA_DIR/svamp_test_set.json

The argument is DATASET,SIZE: svamp,0.5b, gsm8k,0.5b or gsm8k,1.5b. Programs for GSM8K come from `convert`. Start the
same command again to resume. These settings are a first draft: no run of them has been finished yet.
"""

from reft_jax.config import default_config

RUNS = ("svamp,0.5b", "gsm8k,0.5b", "gsm8k,1.5b")


def get_config(argument="svamp,0.5b"):
    if argument not in RUNS:
        raise ValueError(f"{argument!r} is not one of {', '.join(RUNS)}")
    dataset, size = argument.split(",")
    config = default_config()
    config.name = f"{dataset} programs, Qwen2.5-Coder-{size.upper()}-Instruct de-quantized from 4 bits"
    config.model.update(path=f"models/Qwen2.5-Coder-{size.upper()}-Instruct", dtype="bfloat16", remat="none")
    config.data.train, config.data.test = f"data/{dataset}_python_sdp.json", f"data/{dataset}_test_set.json"
    config.data.update(dev_rows=200, train_limit=1700, max_dropped=0.3, pad_multiple=32)
    longer = 2 if dataset == "gsm8k" else 1  # its questions and programs are longer than SVAMP's
    config.sft.update(epochs=3, warmup_epoch=1, batch_size=16, micro_batch=16, learning_rate=1e-5, max_len=192 * longer)
    config.rl.update(iterations=150, questions=32, micro_batch=16, ppo_epochs=1, minibatches=2, learning_rate=3e-6)
    config.rl.update(max_prompt=128 * longer, max_len=224 * longer, eval_every=25, save_every=10)
    config.rl.update(vf_coef=0.1, value_init=0.0)  # as configs/svamp_smollm2.py: few updates
    config.sample.update(n=4, train_n=4, train_limit=400, max_len=256 * longer)
    config.engine.slots = 64
    config.rerank.update(epochs=2, batch_size=16, micro_batch=16, learning_rate=1e-5, max_len=256 * longer)
    config.self_train.update(samples=3, epochs=2, updates=1, learning_rate=3e-6)
    return config
