"""The paper's comparison on a real code model: Qwen2.5-Coder-Instruct, de-quantized from 4 bits.

    python -m reft_jax pipeline --baselines --config=configs/real.py:svamp,0.5b --workdir=runs/svamp-0.5b \
        --config.model.path=$MODEL_DIR/Qwen2.5-Coder-0.5B-Instruct \
        --config.data.train=$DATA_DIR/svamp_python_sdp.json --config.data.test=$DATA_DIR/svamp_test_set.json

The argument is DATASET,SIZE: svamp,0.5b, gsm8k,0.5b or gsm8k,1.5b. Start the same command again to resume. Programs for
GSM8K come from `convert`. For gsm8k the defaults of data.train and data.test are the files that it writes here:

    python -m reft_jax convert gsm8k --in=train.jsonl --out_dir=data/train
    python -m reft_jax convert gsm8k --in=test.jsonl --out_dir=data/test
    python -m reft_jax pipeline --baselines --config=configs/real.py:gsm8k,0.5b --workdir=runs/gsm8k-0.5b \
        --config.model.path=$MODEL_DIR/Qwen2.5-Coder-0.5B-Instruct

Each plan was written before its run, for two hours on two CPU cores. docs/results.md has the results, and the plans
that were given up. In all of them dev, which is held-out training questions, chooses every checkpoint. LoRA of rank 16
saves a quarter of an update's FLOPs. ReFT is DAPO with 8 samples per question and no KL penalty, one update per
iteration at 1e-4. Its baseline is the question's own mean, so no value head has to be learned in a few updates. It
replaces questions that teach nothing because all their samples are right, or all wrong.

svamp: 448 training rows, 128 of them as dev. SFT has three epochs at 2e-4, and two are the warm-up. ReFT has 44
iterations of 4 questions. (36 at 3e-5 were planned. That was changed after iteration 16, before any test question was
read, because dev had not moved.) If hours are left: voting and rerankers with four samples, and self-training.

gsm8k: 480 training rows, 96 of them as dev. Both epochs of SFT are the warm-up. ReFT has 20 iterations of 6 questions
at temperature 0.7, at which more samples are right than at 1. The reward is 1 or 0: with 0.1 for a wrong number the
model learned short programs that do not fail (docs/algorithms.md).

The control of gsm8k is SFT with three times the epochs: `sft` with --config.sft.epochs=6 in a work directory of its
own. It was planned when ReFT's test result was known. Dev chooses its epoch, and test is read once.
"""

from reft_jax.config import default_config

RUNS = ("svamp,0.5b", "gsm8k,0.5b", "gsm8k,1.5b")
FILES = {
    "svamp": ("data/svamp_python_sdp.json", "data/svamp_test_set.json"),  # the authors'
    "gsm8k": ("data/train/gsm8k_python_sdp.json", "data/test/gsm8k_questions.json"),  # what `convert` writes
}


def get_config(argument="svamp,0.5b"):
    if argument not in RUNS:
        raise ValueError(f"{argument!r} is not one of {', '.join(RUNS)}")
    dataset, size = argument.split(",")
    config = default_config()
    config.name = f"{dataset} programs, Qwen2.5-Coder-{size.upper()}-Instruct de-quantized from 4 bits"
    path = f"models/Qwen2.5-Coder-{size.upper()}-Instruct"
    config.model.update(path=path, dtype="bfloat16", remat="none")
    config.data.train, config.data.test = FILES[dataset]
    config.data.update(dev_rows=128, train_limit=448, max_dropped=0.3, pad_multiple=32, line_len=448)
    config.lora.rank = 16
    config.sft.update(epochs=3, warmup_epoch=2, batch_size=16, micro_batch=2, learning_rate=2e-4, max_len=192)
    config.rl.update(algorithm="dapo", iterations=44, questions=4, samples=8, redraws=2, learning_rate=1e-4)
    config.rl.update(micro_batch=2, ppo_epochs=1, max_prompt=128, max_len=224)
    config.rl.update(eval_every=10, save_every=2)
    config.sample.update(n=4, train_n=4, train_limit=300, max_len=224)
    config.engine.slots = 64
    config.rerank.update(epochs=1, batch_size=16, micro_batch=2, learning_rate=2e-4, max_len=224)
    if dataset == "gsm8k":
        config.data.update(dev_rows=96, train_limit=480, max_dropped=0.5)
        config.reward = "examples/right_or_wrong.py:right_or_wrong"
        config.sft.update(epochs=2, warmup_epoch=2, max_len=224)
        config.rl.update(iterations=20, questions=6, temperature=0.7, max_prompt=192, max_len=320)
        config.sample.max_len = config.rerank.max_len = 448  # its questions and programs are longer than SVAMP's
    config.self_train.update(samples=2, epochs=1, updates=1, learning_rate=1e-4)
    return config
