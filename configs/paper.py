"""The paper's runs: a dataset, an answer format, a model size.

    python -m reft_jax pipeline --baselines --config=configs/paper.py:gsm8k,python --workdir=$WORKDIR \
        --config.model.path=$MODEL_DIR/CodeLlama-7b-hf --config.data.train=$DATA_DIR/gsm8k_python_sdp.json \
        --config.data.test=$DATA_DIR/gsm8k_test_set.json --config.mesh.fsdp=8

The argument is DATASET,FORMAT or DATASET,FORMAT,small. DATASET is gsm8k, svamp, mathqa (answers are letters a-e) or
mathqa-numeric. FORMAT is python or nl. `small` is the authors' setting for models of 125M parameters. model.path may be
any folder of the Llama family; the default is CodeLlama-7B. Without `--baselines` a run is SFT, ReFT and the two
rerankers. Its parts are the commands `sft`, `self-train --kind=offline`, `self-train --kind=online`, `reft`, `sample`
and `rerank`.

The table has the authors' scores of CodeLlama-7B in %, top-1 if nothing else is said; "–" means that the available
tables do not have it. Chip-hours are those of one epoch of PPO on 32 chips of TPU v5e, as `plan` estimates them
(docs/pods.md): 2.33 s per iteration of 32 questions in every row, because all rows have the same shapes; "–" means that
the number of questions is not known here. Nothing here has been run, because it needs a pod.

    argument               SFT warm-up   SFT                    ReFT                   chip-hours
    gsm8k,python           63.00         63.68                  75.28                  4.8
      voting@100           –             68.0                   78.0
      rerank@100           –             77.0                   81.2
    gsm8k,nl               –             43.59                  53.30                  4.8
    svamp,python           –             75.40                  79.19                  2.0
    svamp,nl               –             –                      –                      2.0
    mathqa,python          –             –                      –                      –
    mathqa,nl              –             56.01                  60.13                  –
    mathqa-numeric,nl      –             –                      –                      –
    mathqa-numeric,python  not run by the authors                                      –
    offline and online self-training: – in every row; reranking: GSM8K only

Checkpoints are chosen on the test file, as in the paper; set data.dev_rows to hold out training questions instead.
"""

from reft_jax.config import default_config

DATASETS, FORMATS, SIZES = ("gsm8k", "svamp", "mathqa", "mathqa-numeric"), ("python", "nl"), ("7b", "small")
FILES = {"python": "python_sdp", "nl": "nl"}  # the authors' names
WARMUP_EPOCH = {("mathqa", "nl"): 5, ("mathqa-numeric", "nl"): 10}  # 2 for the others


def get_config(argument="gsm8k,python"):
    parts = argument.split(",")
    dataset, answer_format, size = parts if len(parts) == 3 else (*parts, "7b") if len(parts) == 2 else ("", "", "")
    if dataset not in DATASETS or answer_format not in FORMATS or size not in SIZES:
        raise ValueError(f"{argument!r} is not DATASET,FORMAT[,small] of {DATASETS} and {FORMATS}")
    config = default_config()
    config.name = f"{dataset} {answer_format}, {'CodeLlama-7B' if size == '7b' else 'small model'}"
    config.model.path = "models/CodeLlama-7b-hf"
    config.data.train = f"data/{dataset}_{FILES[answer_format]}.json"
    config.data.test = f"data/{dataset}_test_set.json"
    config.data.format = answer_format
    config.sft.warmup_epoch = WARMUP_EPOCH.get((dataset, answer_format), 2)
    config.rl.kl_coef = 0.05 if answer_format == "nl" and dataset != "mathqa-numeric" else 0.01
    if size == "small":
        config.sft.update(learning_rate=2e-5, warmup_epoch=10)  # the authors' for GSM8K
        config.rl.update(learning_rate=3e-6, questions=256, epochs=700)
        config.self_train.learning_rate = 3e-6
    return config
