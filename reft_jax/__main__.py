"""python -m reft_jax COMMAND --config=FILE --workdir=DIR [--config.KEY=VALUE …]

  pipeline   sft, reft, sample, rerank and evaluate in order; skips what is done; ends with the table
  sft        supervised fine-tuning: makes the models "warmup" and "sft"
  reft       PPO from "warmup": makes "reft"
  sample     n completions a question:  --model=warmup|sft|reft --split=test|train
  rerank     the reranker of a model:   --model=sft|reft
  evaluate   the table of what is in the work directory; with --replay nothing is run: every logged execution is
             graded again from its outcome
  export     a Hugging Face folder:     --model=warmup|sft|reft|rerank_sft|rerank_reft --out=DIR
  check      is a model, on this machine, ready for a run?  --model=DIR (no --workdir)
  plan       does it fit a pod, how fast can it be?  --topology=v5e:4x8 [--search] [--json] (no --workdir; docs/pods.md)
  solve      one question:              --model=DIR "question" [--engine=nl] [--max_len=512]
  convert    training files from published data: gsm8k|svamp|mathqa|mathqa-numeric --in=FILE --out-dir=DIR
             [--show=20 --seed=0]: print random programs (no --workdir; docs/data.md)

Every setting, its default and its meaning stand in reft_jax/config.py.
Exit codes: 0 done, 1 a check failed, 2 wrong input.
"""

import os
import sys
from pathlib import Path

from absl import flags

from reft_jax.config import parse_config, parse_flags
from reft_jax.types import InputError

COMMANDS = ("pipeline", "sft", "reft", "sample", "rerank", "evaluate", "export", "check", "plan", "solve", "convert")
MODELS = {"sample": ("warmup", "sft", "reft"), "rerank": ("sft", "reft")}
MODELS["export"] = (*MODELS["sample"], "rerank_sft", "rerank_reft")
NEEDS = {"reft": ["warmup"], "rerank": ["warmup"], "evaluate": ["sft"]}  # models of earlier stages, beside --model


def main() -> None:
    """The console script `reft`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    try:
        run_command(sys.argv[1:])
    except InputError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


def run_command(argv: list[str]) -> None:
    """Parses the flags of one command and runs it. Raises InputError before anything is compiled or written."""
    if not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    command, argv = argv[0], ["reft", *argv[1:]]
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}; commands: {', '.join(COMMANDS)}")
    if command == "solve":
        solve(argv)
        return
    if command == "check":
        check(argv)
        return
    if command == "convert":
        convert(argv)
        return
    if command == "plan":
        plan(argv)
        return
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder for everything this run writes", flag_values=values)
    if command in MODELS:
        flags.DEFINE_enum("model", None, MODELS[command], "which model of the work directory", flag_values=values)
    if command == "sample":
        flags.DEFINE_enum("split", "test", ("test", "train"), "which questions", flag_values=values)
    if command == "evaluate":
        flags.DEFINE_bool("replay", False, "grade executions.jsonl.gz again, without a model", flag_values=values)
    if command == "export":
        flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    config = parse_config(argv, values)
    for name in ("workdir", "model", "out"):
        if name in values and not values[name].value:
            raise InputError(f"--{name} is missing; see python -m reft_jax --help")
    if command == "export" and os.path.isdir(values.out) and os.listdir(values.out):
        raise InputError(f"--out: {values.out} is not empty; choose another folder or remove it")
    if command == "evaluate" and values.replay:
        from reft_jax.runs.executions import replay

        sys.exit(0 if replay(Path(values.workdir)) else 1)
    needs = NEEDS.get(command, []) + ([values.model] if command in MODELS else [])
    from reft_jax.runs.setup import open_run

    with open_run(config, Path(values.workdir), needs) as run:
        dispatch(command, run, values)


def dispatch(command: str, run, values: flags.FlagValues) -> None:
    if command == "pipeline":
        from reft_jax.runs.pipeline import run_pipeline

        run_pipeline(run)
    elif command == "sft":
        from reft_jax.runs.sft import run_sft

        run_sft(run)
    elif command == "reft":
        from reft_jax.runs.reft import run_reft

        run_reft(run)
    elif command == "sample":
        from reft_jax.runs.sample import run_sample

        run_sample(run, values.model, values.split)
    elif command == "rerank":
        from reft_jax.runs.rerank import run_rerank

        run_rerank(run, values.model)
    elif command == "evaluate":
        from reft_jax.runs.evaluate import run_evaluate

        run_evaluate(run)
    else:
        from reft_jax.runs.export import run_export

        run_export(run, values.model, Path(values.out))


def check(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, "Hugging Face folder", flag_values=values)
    config = parse_config(argv, values)
    if not values.model:
        raise InputError("--model=DIR is missing; see python -m reft_jax --help")
    from reft_jax.runs.check import run_check

    sys.exit(0 if run_check(Path(values.model), config) else 1)


def plan(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_list("topology", None, "a pod, as v5e:4x8 or v5p:4x4x4; with --search several", flag_values=values)
    flags.DEFINE_bool("search", False, "rank meshes, micro-batches and remat; compile the best", flag_values=values)
    grow = "plan several pods, batches in proportion to their chips: the config's are for this many; 0: do not"
    flags.DEFINE_integer("grow", 0, grow, lower_bound=0, flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON", flag_values=values)
    flags.DEFINE_integer("questions", 7473, "of an epoch (GSM8K's)", lower_bound=1, flag_values=values)
    flags.DEFINE_string("into", "", "also write the tables between their marks in this file", flag_values=values)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft_jax" / "plan"
    flags.DEFINE_string("cache", str(cache), "folder that keeps what was compiled", flag_values=values)
    config = parse_config(argv, values)
    if not values.topology or (len(values.topology) > 1 and not values.search and not values.grow):
        raise InputError("--topology is missing, or several without --search or --grow; write --topology=v5e:4x8")
    # Before JAX starts: the TPU compiler needs no TPU, but would ask a TPU machine's server for one, and let no other
    # process compile.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}  # else it warns
    from reft_jax.runs.plan_table import run_plan

    sys.exit(0 if run_plan(config, values) else 1)


def solve(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, "Hugging Face folder", flag_values=values)
    flags.DEFINE_enum("engine", "python", ("python", "nl"), "program or text", flag_values=values)
    flags.DEFINE_integer("max_len", 512, "tokens of prompt and answer", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("allow_unsandboxed", False, "as executor.allow_unsandboxed of a config", flag_values=values)
    questions = parse_flags(argv, values)
    if not values.model or len(questions) != 1 or not questions[0].strip():
        raise InputError('solve takes a folder and one question: python -m reft_jax solve --model=DIR "question"')
    from reft_jax.runs.solve import run_solve

    run_solve(
        Path(values.model),
        questions[0],
        engine=values.engine,
        max_len=values.max_len,
        allow_unsandboxed=values.allow_unsandboxed,
    )


def convert(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("in", None, "file, or hub:owner/name:split; openai/gsm8k if left out", flag_values=values)
    flags.DEFINE_string("out-dir", None, "folder to write", flag_values=values)
    flags.DEFINE_integer("show", 0, "programs to print", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("seed", 0, "which programs are printed", flag_values=values)
    flags.DEFINE_bool("allow_unsandboxed", False, "as executor.allow_unsandboxed of a config", flag_values=values)
    datasets = parse_flags(argv, values)
    known = ("gsm8k", "svamp", "mathqa", "mathqa-numeric")
    if len(datasets) != 1 or datasets[0] not in known:
        raise InputError(f"convert takes one dataset of {', '.join(known)}: python -m reft_jax convert gsm8k --in=FILE")
    if not values["out-dir"].value:
        raise InputError("--out-dir is missing; see python -m reft_jax --help")
    source = values["in"].value or ("openai/gsm8k" if datasets[0] == "gsm8k" else "")
    if not source:
        raise InputError(f"--in is missing: name the file of {datasets[0]}")
    from reft_jax.runs.convert import run_convert

    run_convert(
        datasets[0],
        source,
        Path(values["out-dir"].value),
        show=values.show,
        seed=values.seed,
        allow_unsandboxed=values.allow_unsandboxed,
    )


if __name__ == "__main__":
    main()
