"""How much of the packed lines is padding, for lines of several lengths? Counts only; nothing is computed.

    python benchmarks/padding.py --model=DIR --data=FILE [--rows=64] [--max_len=224] [--draws=100]

Draws so many rows from the worked solutions of the data file, packs them, and prints the mean padding for each largest
length of a line and number of lines in a micro-batch.
"""

import numpy as np
from absl import app, flags

from reft_jax.tasks.datasets import load_examples
from reft_jax.tasks.prompts import make_prompter, sft_target
from reft_jax.tasks.tokenizer import load_tokenizer
from reft_jax.train.packing import Packing

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "folder with the tokenizer", required=True)
flags.DEFINE_string("data", None, "training questions with programs, a JSON file", required=True)
flags.DEFINE_integer("rows", 64, "rows of a batch")
flags.DEFINE_integer("max_len", 224, "tokens; longer rows are left out")
flags.DEFINE_integer("draws", 100, "batches to draw")
MULTIPLE = 32  # data.pad_multiple


def main(_) -> None:
    prompter = make_prompter(load_tokenizer(FLAGS.model))
    examples = load_examples(FLAGS.data, need_cot=True)
    rows = [prompter.row(one.question, sft_target(one, "python"))[0] for one in examples]
    rows = [row for row in rows if len(row) <= FLAGS.max_len]
    print(f"{len(rows)} rows of at most {FLAGS.max_len} tokens, {np.mean([len(row) for row in rows]):.0f} on average")
    for times, lines in ((1, 4), (2, 4), (2, 2), (4, 1)):
        size = {"max_len": times * FLAGS.max_len, "micro_batch": lines, "micro_batches": -(-FLAGS.rows // lines)}
        found = []
        for seed in range(FLAGS.draws):
            drawn = np.random.default_rng(seed).choice(len(rows), FLAGS.rows, replace=False)
            chosen = [rows[i] for i in drawn]
            found.append(Packing(chosen, [0] * len(chosen), [1] * len(chosen), multiple=MULTIPLE, **size).padding)
        print(f"lines of up to {size['max_len']}, {lines} per micro-batch: {np.mean(found):.1%} padding")


if __name__ == "__main__":
    app.run(main)
