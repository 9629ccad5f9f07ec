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

The first plan was full training with PPO: 1,200 questions and 60 iterations of 64 samples. It was never finished. An
iteration took 170 s on two CPU cores with AMX and up to 17 GB of memory, and the stage was ended for lack of memory or
time before it had a result. No test question was read.

The second plan, written before ReFT started. It must fit into two hours on two CPU cores:

- 448 training rows, 128 of them as dev. Dev chooses every checkpoint. All 1,000 test questions, greedy, once, after
  everything is trained.
- LoRA of rank 16 everywhere: a quarter of an update's FLOPs is saved, and the process needs 6 GB.
- SFT: three epochs at 2e-4. Two of them are the warm-up, as in the paper's GSM8K runs.
- ReFT: DAPO, 44 iterations of 4 questions × 8 samples, one update each at 1e-4, no KL penalty. After SFT most training
  questions are always solved. PPO would spend most of its updates on them; DAPO replaces them by questions that are
  solved sometimes. Its baseline is the question's own mean, so no value head has to be learned in 44 updates.
  The plan said 36 iterations at 3e-5. It was changed after iteration 16, before any test question was read, because dev
  had not moved (86.7 % at the start and after iteration 12). The run continued from there.
- If hours are left: voting with four samples per question, and self-training. Offline: one epoch with two samples per
  question. Online: as many iterations as ReFT. The rerankers learn from four samples of each of 300 questions.

The third plan, for GSM8K, written before anything of it ran. docs/results.md says what the second one missed: training
questions that are as hard as the test questions, and larger batches. It must fit into two hours on two CPU cores:

- 480 training questions, 96 of them as dev. 500 test questions, greedy, for the base, the warm-up, SFT and ReFT.
- SFT: two epochs of the rows of at most 224 tokens; the first is the warm-up.
- ReFT: DAPO, 24 iterations of 6 questions × 8 samples at 1e-4, dev after every 8. No KL penalty: it would cost a pass
  of the reference, and 24 updates of an adapter cannot lead far away.

It was stopped after iteration 11, and no test question was read. The share of right samples stayed at 8 %, but
responses shrank from 80 to 28 tokens: the reward of 0.1 for a wrong number was all that most questions could give. SFT
was better than its warm-up, 21.9 and 13.5 % of dev, so the warm-up was too short. The fourth plan therefore has:

- the same SFT, with both epochs as the warm-up;
- a reward of 1 or 0 (examples/right_or_wrong.py), so that DAPO draws other questions instead of those without a right
  sample, up to twice;
- temperature 0.7, at which more samples are right; 20 iterations, dev after every 10;
- all 1,000 test questions for SFT and ReFT, decided after iteration 10 and before any of them was asked.
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
    longer = 2 if dataset == "gsm8k" else 1  # its questions and programs are longer than SVAMP's
    config.data.update(dev_rows=128, train_limit=448, max_dropped=0.3, pad_multiple=32, line_len=448 * longer)
    config.lora.rank = 16
    config.sft.update(epochs=3, warmup_epoch=2, batch_size=16, micro_batch=2, learning_rate=2e-4, max_len=192 * longer)
    config.rl.update(algorithm="dapo", iterations=44, questions=4, samples=8, redraws=2, learning_rate=1e-4)
    config.rl.update(micro_batch=2, ppo_epochs=1, max_prompt=128 * longer, max_len=224 * longer)
    config.rl.update(eval_every=10, save_every=2)
    config.sample.update(n=4, train_n=4, train_limit=300, max_len=224 * longer)
    config.engine.slots = 64
    config.rerank.update(epochs=1, batch_size=16, micro_batch=2, learning_rate=2e-4, max_len=224 * longer)
    if dataset == "gsm8k":
        config.data.update(dev_rows=96, train_limit=480, max_dropped=0.5, line_len=448)
        config.reward = "examples/right_or_wrong.py:right_or_wrong"
        config.sft.update(epochs=2, warmup_epoch=2, max_len=224)
        config.rl.update(iterations=20, questions=6, temperature=0.7, max_prompt=192, max_len=320)
    config.self_train.update(samples=2, epochs=1, updates=1, learning_rate=1e-4)
    return config
