"""Which of the shipped configs fit which pods? Plans each with the TPU compiler, and prints one table.

    launch/venv.sh plan
    python benchmarks/plans.py [--only=TEXT] [--cache=DIR]

A run takes about five minutes on two quiet cores. Functions that are compiled already are not compiled again, so the
same command continues where it was stopped. Needs no TPU.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from absl import app, flags

from reft_jax.plan.table import table

FLAGS = flags.FLAGS
flags.DEFINE_string("only", "", "plan only runs whose name contains this")
flags.DEFINE_string("cache", str(Path("~/.cache/reft_jax/plan").expanduser()), "compiled functions are kept here")
RUNS = [
    ("CodeLlama-7B", "gsm8k_codellama_7b_reft.py", "v5e:4x8"),
    ("CodeLlama-7B, GRPO with LoRA", "gsm8k_codellama_7b_grpo_lora.py", "v5e:2x4"),
    ("CodeLlama-13B", "gsm8k_codellama_13b_reft.py", "v5p:4x4x4"),
    ("Qwen2.5-Coder-7B", "gsm8k_pods.py:Qwen2.5-Coder-7B", "v5e:4x8"),
    ("Llama-3.1-8B", "gsm8k_pods.py:Llama-3.1-8B", "v5e:4x8"),
    ("Qwen2.5-Coder-1.5B", "gsm8k_pods.py:Qwen2.5-Coder-1.5B", "v5e:2x4"),
    ("Qwen2.5-Coder-1.5B with LoRA", "gsm8k_qwen_1_5b_lora.py", "v5e:2x4"),
]
TIMES = {"decode, PPO": 1e3, "decode, sampling": 1e3, "SFT update": 1, "PPO update": 1}
HEAD = ["run", "pod", "fits", "GiB per chip", "to spare", "decode, PPO, ms", "decode, sampling, ms", "SFT update, s"]
HEAD += ["PPO update, s", "iteration, s", "chip-hours per epoch"]
REPO = Path(__file__).resolve().parent.parent


def planned(config: str, topology: str) -> dict:
    """The run's plan as JSON. Exit code 1, for a run that does not fit, is an answer too."""
    words = [f"--config={REPO}/configs/{config}", f"--topology={topology}", f"--cache={FLAGS.cache}", "--json"]
    done = subprocess.run([sys.executable, "-m", "reft_jax", "plan", *words], cwd=REPO, stdout=subprocess.PIPE)
    if done.returncode > 1 or not done.stdout:
        sys.exit(f"plan {' '.join(words)} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def row(name: str, topology: str, plan: dict) -> list[str]:
    """A row of the table, in the columns of HEAD. A time is roofline / compiler's."""
    functions, chip = plan["programs"], plan["chip"]
    most = max(function["resident"] for function in functions.values())

    def times(name: str, unit: float) -> str:
        function = functions[name]
        cycles = function["cost"]["cycles"] / function["once"]
        return " / ".join(f"{unit * s:.3g}" for s in (function["seconds"]["estimate"], cycles / chip["clock"]))

    return [
        name,
        topology,
        "yes" if plan["fits"] else "no",
        f"{most / 2**30:.1f} of {chip['memory'] / 2**30:.0f}",
        f"{1 - most / chip['memory']:.0%}",
        *(times(one, unit) for one, unit in TIMES.items()),
        f"{plan['seconds']:.2f}",
        f"{plan['epoch_chip_hours']:.1f}",
    ]


def main(_) -> None:
    chosen = [run for run in RUNS if FLAGS.only in run[0]]
    rows = [row(name, topology, planned(config, topology)) for name, config, topology in chosen]
    print(f"`python benchmarks/plans.py`, JAX {version('jax')}, libtpu {version('libtpu')}:\n\n{table(HEAD, rows)}")


if __name__ == "__main__":
    app.run(main)
