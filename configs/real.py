"""The paper's comparison on a real code model: Qwen2.5-Coder-Instruct, de-quantized from 4 bits.

    python -m reft_jax pipeline --baselines --config=configs/real.py:svamp,0.5b --workdir=runs/svamp-0.5b \
        --config.model.path=$MODEL_DIR/Qwen2.5-Coder-0.5B-Instruct \
        --config.data.train=$DATA_DIR/svamp_python_sdp.json --config.data.test=$DATA_DIR/svamp_test_set.json

The argument is DATASET,SIZE: svamp,0.5b, gsm8k,0.5b or gsm8k,1.5b. Programs for GSM8K come from `convert`. Start the
same command again to resume. On two CPU cores the 0.5B model needs about 10 GB of memory with the environment variable
GLIBC_TUNABLES=glibc.malloc.hugetlb=1. With glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736 besides, the
memory of one update is kept for the next: an update of 4 rows took a fifth less time, but the process grew to 22 GB.

The plan, written before the run of svamp,0.5b:

- 1,200 training rows, 200 of them as dev. Dev chooses every checkpoint. All 1,000 test questions, greedy, once.
- SFT: three epochs at 1e-5, the first as warm-up.
- ReFT: 60 iterations of 64 questions, one pass of two updates at 2e-6. The value head starts at 0 and has too few
  updates to learn. So λ is 1: then each token's advantage is the reward of its row less the mean. With the paper's λ of
  0.95 and a value of 0, early tokens of a row get less than late ones. A pilot with it (300 questions, 18 iterations of
  32, 3e-6) taught the model to write less: from 57 tokens a response to 38. The KL reached 8. Dev fell from 81 to 70
  of 100 by iteration 10. A pilot with λ = 1 (64 questions, 2e-6) was stopped after four iterations: responses did not
  get shorter, the KL was 1.1. It will be resumed, and may still change the learning rate before ReFT starts.
- Baselines: one epoch of offline self-training with two samples per question; online self-training for as many
  iterations.
- Voting and rerankers: four samples per question. The rerankers learn from four samples of each of 400 questions.
"""

from reft_jax.config import default_config

RUNS = ("svamp,0.5b", "gsm8k,0.5b", "gsm8k,1.5b")


def get_config(argument="svamp,0.5b"):
    if argument not in RUNS:
        raise ValueError(f"{argument!r} is not one of {', '.join(RUNS)}")
    dataset, size = argument.split(",")
    config = default_config()
    config.name = f"{dataset} programs, Qwen2.5-Coder-{size.upper()}-Instruct de-quantized from 4 bits"
    path = f"models/Qwen2.5-Coder-{size.upper()}-Instruct"
    config.model.update(path=path, dtype="bfloat16", remat="full")  # "none" saves no time on a CPU
    config.data.train, config.data.test = f"data/{dataset}_python_sdp.json", f"data/{dataset}_test_set.json"
    config.data.update(dev_rows=200, train_limit=1200, max_dropped=0.3, pad_multiple=32)
    longer = 2 if dataset == "gsm8k" else 1  # its questions and programs are longer than SVAMP's
    config.sft.update(epochs=3, warmup_epoch=1, batch_size=16, micro_batch=16, learning_rate=1e-5, max_len=192 * longer)
    config.rl.update(iterations=60, questions=64, micro_batch=16, ppo_epochs=1, minibatches=2, learning_rate=2e-6)
    config.rl.update(max_prompt=128 * longer, max_len=224 * longer, eval_every=10, save_every=5)
    config.rl.update(lam=1.0, vf_coef=0.1, value_init=0.0)
    config.sample.update(n=4, train_n=4, train_limit=400, max_len=256 * longer)
    config.engine.slots = 64
    config.rerank.update(epochs=1, batch_size=16, micro_batch=16, learning_rate=1e-5, max_len=256 * longer)
    config.self_train.update(samples=2, epochs=1, updates=1, learning_rate=2e-6)
    return config
