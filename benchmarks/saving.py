"""What does saving cost? PPO of the embedded default in blocks of ten iterations, every second one begins with a save.

    python benchmarks/saving.py [--blocks=12]

A block lasts from the last line of the metrics before it to its own last line, so it has all of a save: the copy, the
checksums, and what is written in the background beside its iterations. Evaluations, which take time in any case, are
left out, and so is the first block, which compiles. Rewrites the table in benchmarks/README.md.
"""

import statistics
import tempfile
import time
from pathlib import Path

from absl import app, flags
from machine import report

from reft_jax.config import check_config, load_config
from reft_jax.run.open import open_run
from reft_jax.stages.loop import Training
from reft_jax.stages.reft import run_reft
from reft_jax.stages.sft import run_sft

FLAGS = flags.FLAGS
flags.DEFINE_integer("blocks", 12, "blocks of ten iterations that are measured", lower_bound=2)
flags.DEFINE_bool("write", True, "rewrite the table in benchmarks/README.md")
EVERY = 10


def main(_: list[str]) -> None:
    config = load_config(str(Path(__file__).parents[1] / "configs" / "quickstart.py"))
    iterations = EVERY * (FLAGS.blocks + 1)
    config.sft.update(epochs=1, warmup_epoch=1, eval_every=1)
    config.rl.update(iterations=iterations, eval_every=iterations, save_every=EVERY)
    ends, saves, write, save = [], [], Training.write, Training.save

    def timed_write(self, line):
        write(self, line)
        if self.folder.name == "reft" and self.done % EVERY == 0:
            ends.append(time.perf_counter())

    def every_second_save(self):
        if self.folder.name != "reft" or self.done // EVERY % 2:
            begun = time.perf_counter()
            save(self)
            saves.append(time.perf_counter() - begun)

    with tempfile.TemporaryDirectory() as folder, open_run(check_config(config), Path(folder), []) as run:
        run_sft(run)
        saves.clear()
        Training.write, Training.save = timed_write, every_second_save
        run_reft(run)
    blocks = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    saved, unsaved = statistics.median(blocks[0::2]), statistics.median(blocks[1::2])
    lines = [
        f"| block of {EVERY} iterations | median s | from | to |",
        "| --- | --- | --- | --- |",
        f"| with a save ({len(blocks[0::2])}) | {saved:.2f} | {min(blocks[0::2]):.2f} | {max(blocks[0::2]):.2f} |",
        f"| without ({len(blocks[1::2])}) | {unsaved:.2f} | {min(blocks[1::2]):.2f} | {max(blocks[1::2]):.2f} |",
        "",
        f"Difference of the medians: {saved / unsaved - 1:+.1%}. `save` held the loop up for "
        f"{1000 * statistics.median(saves):.0f} ms (median of {len(saves)}), {statistics.median(saves) / unsaved:.2%}.",
    ]
    print("\n".join(lines))
    report("saving", "", lines, FLAGS.write)


if __name__ == "__main__":
    app.run(main)
