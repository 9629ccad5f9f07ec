"""python -m reft_jax COMMAND --config=FILE --workdir=DIR [--config.KEY=VALUE …]      (or --version)

  pipeline   sft, reft, sample, rerank and evaluate in order; skips what is done; ends with the table; with --baselines
             the self-trained models too
  sft        supervised fine-tuning: makes the models "warmup" and "sft"
  reft       PPO from "warmup": makes "reft"
  self-train a baseline: --kind=offline|online makes "self_train_offline", "self_train_online"
  sample     n completions a question:  --model=warmup|sft|reft|self_train_… --split=test|train
  rerank     the reranker of a model:   --model=sft|reft|self_train_…
  evaluate   the table of what is in the work directory; with --replay nothing is run: every logged execution is
             graded again from its outcome (docs/evaluation.md)
             a sweep:    --models=[NAME=]FOLDER[+RERANKER],… --data=[NAME=]FILE,…
             no model:   --samples=FILE_OR_FOLDER,… [--execute] [--out-dir=DIR] grades stored answers again
                         (no --config, no --workdir)
  export     a Hugging Face folder:     --model=warmup|sft|reft|self_train_…|rerank_… --out=DIR
             [--dtype=float32|bfloat16|float16], the base's if left out
  check      is a model, on this machine, ready for a run?  --model=DIR (no --workdir)
  plan       does it fit a pod, how fast can it be?  --topology=v5e:4x8 [--search] [--json] (no --workdir; docs/pods.md)
  solve      one question:              --model=DIR "question" [--engine=nl] [--max_len=512]; DIR may be RUN/models/NAME
  convert    training files from published data: gsm8k|svamp|mathqa|mathqa-numeric --in=FILE --out-dir=DIR
             [--show=20 --seed=0]: print random programs (no --workdir; docs/data.md)
             a folder with pytorch_model*.bin to safetensors: weights --in=DIR --out-dir=DIR

Several hosts run one command together: each the same, on a TPU pod and under srun just so, elsewhere with
--coordinator=HOST:PORT --num_processes=N --process_id=0…N-1 (docs/pods.md). --workdir is a folder that all of them see.

Every setting, its default and its meaning stand in reft_jax/config.py. The same command goes on where a run ended; if
settings have changed since, name those that may: --allow_config_change=KEY,KEY (docs/reliability.md)
Exit codes: 0 done; 1 a check failed, or the program broke down; 2 wrong input; 3 a number was NaN or infinite, and what
made it is saved; 4 the disk is full or cannot be written; 75 stopped by SIGTERM or SIGINT with everything saved: run it
again. A second signal ends it at once: 128 + its number.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

from absl import flags

from reft_jax import terminal
from reft_jax.config import SETTINGS, nearest, parse_config, parse_flags
from reft_jax.model_folder import check_new_folder
from reft_jax.store import DISK, not_written
from reft_jax.types import InputError, NotFiniteError, SaveError, Stopped

COMMANDS = (
    "pipeline",
    "sft",
    "reft",
    "self-train",
    "sample",
    "rerank",
    "evaluate",
    "export",
    "check",
    "plan",
    "solve",
    "convert",
)
RANKED = ("sft", "reft", "self_train_offline", "self_train_online")
MODELS = {"sample": ("warmup", *RANKED), "rerank": RANKED}
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
MODELS["export"] = (*MODELS["sample"], *(f"rerank_{name}" for name in RANKED))
# Models of earlier stages, beside --model.
NEEDS = {"reft": ["warmup"], "self-train": ["warmup"], "rerank": ["warmup"], "evaluate": ["sft"]}


def main() -> None:
    """The console script `reft`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    terminal.prepare()
    try:
        with terminal.one_line_on_ctrl_c():
            run_command(sys.argv[1:])
        sys.stdout.flush()  # here, where a full disk is still an error of ours
    except Stopped as stop:
        print(f"stopped by {stop}; what was done is saved: the same command goes on", file=sys.stderr)
        sys.exit(stop.exit_code)
    except (InputError, NotFiniteError, SaveError) as error:
        end(error.exit_code, error)
    except OSError as error:
        if error.errno not in DISK:
            raise
        end(SaveError.exit_code, not_written("a file", error))
    except KeyboardInterrupt:
        os._exit(terminal.INTERRUPTED)  # an orderly end would wait for threads that wait for programs


def end(code: int, error) -> NoReturn:
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
    sys.exit(code)


def run_command(argv: list[str]) -> None:
    """Parses the flags of one command and runs it. Raises InputError before anything is compiled or written."""
    if not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    if argv[0] in ("--version", "version"):
        from reft_jax.run.about import commit, versions

        made_of = ", ".join(f"{name} {number}" for name, number in versions().items() if name != "reft_jax")
        print(f"reft_jax {versions()['reft_jax']}{f' ({commit()})' if commit() else ''}\n{made_of}")
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
    if command == "evaluate" and any(argument.lstrip("-").startswith("samples") for argument in argv):
        regrade(argv)
        return
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder for everything this run writes", flag_values=values)
    flags.DEFINE_list("allow_config_change", [], "settings that may differ from the workdir's", flag_values=values)
    if command in MODELS:
        flags.DEFINE_enum("model", None, MODELS[command], "which model of the work directory", flag_values=values)
    if command == "sample":
        flags.DEFINE_enum("split", "test", ("test", "train"), "which questions", flag_values=values)
    if command == "evaluate":
        flags.DEFINE_bool("replay", False, "grade executions.jsonl.gz again, without a model", flag_values=values)
        flags.DEFINE_string("models", "", "checkpoints of a sweep: [NAME=]FOLDER[+RERANKER],…", flag_values=values)
        flags.DEFINE_string("data", "", "its files: [NAME=]FILE,…; if left out, data.test", flag_values=values)
    if command == "self-train":
        flags.DEFINE_enum("kind", None, ("offline", "online"), "which baseline", flag_values=values)
    if command == "pipeline":
        flags.DEFINE_bool("baselines", False, "self-training too, offline and online", flag_values=values)
    if command == "export":
        flags.DEFINE_string("out", None, "folder to write", flag_values=values)
        flags.DEFINE_enum("dtype", None, EXPORT_DTYPES, "of the weights; if left out, the base's", flag_values=values)
    flags.DEFINE_string("coordinator", None, "address and port of host 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many hosts there are", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "which one this is, from 0", lower_bound=0, flag_values=values)
    config = parse_config(argv, values)
    for name in ("workdir", "model", "kind", "out"):
        if name in values and not values[name].value:
            raise InputError(f"--{name} is missing; see python -m reft_jax --help")
    for key in values.allow_config_change:
        if key not in SETTINGS:
            raise InputError(f"--allow_config_change: unknown key {key!r}; did you mean {nearest(key, SETTINGS)!r}?")
    if command == "evaluate" and values.replay:
        from reft_jax.run.executions import replay

        sys.exit(0 if replay(Path(values.workdir)) else 1)
    if command == "evaluate" and values.data and not values.models:
        raise InputError("--data belongs to a sweep: --models=FOLDER,… is missing; see python -m reft_jax --help")
    needs = NEEDS.get(command, []) + ([values.model] if command in MODELS else [])
    from reft_jax.parallel import hosts
    from reft_jax.run.open import open_run

    with hosts.joined(values.coordinator, values.num_processes, values.process_id):
        if command == "export":
            hosts.from_first("--out", lambda: check_new_folder("--out", Path(values.out)))
        if command == "evaluate" and values.models:
            from reft_jax.commands.sweep import parse_checkpoints, parse_data, run_sweep

            checkpoints, files = parse_checkpoints(values.models), parse_data(values.data or config.data.test)
            run_sweep(config, Path(values.workdir).absolute(), checkpoints, files, values.allow_config_change)
            return
        workdir, reads = Path(values.workdir), command == "export"
        with open_run(config, workdir, needs, values.allow_config_change, reads=reads) as run:
            dispatch(command, run, values)


def dispatch(command: str, run, values: flags.FlagValues) -> None:
    if command == "pipeline":
        from reft_jax.commands.pipeline import run_pipeline

        run_pipeline(run, baselines=values.baselines)
    elif command == "sft":
        from reft_jax.stages.sft import run_sft

        run_sft(run)
    elif command == "reft":
        from reft_jax.stages.reft import run_reft

        run_reft(run)
    elif command == "self-train":
        from reft_jax.stages.self_train import run_offline, run_online

        {"offline": run_offline, "online": run_online}[values.kind](run)
    elif command == "sample":
        from reft_jax.stages.sample import run_sample

        run_sample(run, values.model, values.split)
    elif command == "rerank":
        from reft_jax.stages.rerank import run_rerank

        run_rerank(run, values.model)
    elif command == "evaluate":
        from reft_jax.commands.evaluate import run_evaluate

        run_evaluate(run)
    else:
        from reft_jax.commands.export import run_export

        run_export(run, values.model, Path(values.out), values.dtype)


def check(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, "Hugging Face folder", flag_values=values)
    config = parse_config(argv, values)
    if not values.model:
        raise InputError("--model=DIR is missing; see python -m reft_jax --help")
    from reft_jax.commands.check import run_check

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
    from reft_jax.plan.table import run_plan

    sys.exit(0 if run_plan(config, values) else 1)


def solve(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, "Hugging Face folder or RUN/models/NAME", flag_values=values)
    flags.DEFINE_enum("engine", None, ("python", "nl"), "program or text; the run's, else python", flag_values=values)
    flags.DEFINE_integer("max_len", 512, "tokens of prompt and answer", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("allow_unsandboxed", False, "as executor.allow_unsandboxed of a config", flag_values=values)
    questions = parse_flags(argv, values)
    if not values.model or len(questions) != 1 or not questions[0].strip():
        raise InputError('solve takes a folder and one question: python -m reft_jax solve --model=DIR "question"')
    from reft_jax.commands.solve import run_solve

    run_solve(
        Path(values.model),
        questions[0],
        answer_format=values.engine,
        max_len=values.max_len,
        allow_unsandboxed=values.allow_unsandboxed,
    )


def regrade(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("samples", None, "sample files, or folders of them, with commas between", flag_values=values)
    flags.DEFINE_bool("execute", False, "run every program again", flag_values=values)
    flags.DEFINE_string("task", "", "as task of a config", flag_values=values)
    flags.DEFINE_string("out-dir", None, "folder for sweep.md and sweep.json", flag_values=values)
    flags.DEFINE_integer("seed", 42, "of subsets and intervals", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("allow_unsandboxed", False, "as executor.allow_unsandboxed of a config", flag_values=values)
    if extra := parse_flags(argv, values):
        raise InputError(f"unexpected argument {extra[0]!r}; name all sample files in --samples, with commas")
    if not values.samples:
        raise InputError("--samples is empty; name sample files, or a folder of them")
    from reft_jax.commands.paths import listed
    from reft_jax.commands.regrade import run_regrade

    run_regrade(
        listed(values.samples),
        execute=values.execute,
        out_dir=Path(values["out-dir"].value) if values["out-dir"].value else None,
        seed=values.seed,
        allow_unsandboxed=values.allow_unsandboxed,
        task=values.task,
    )


def convert(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "in", None, "file, folder, or hub:owner/name:split; openai/gsm8k if left out", flag_values=values
    )
    flags.DEFINE_string("out-dir", None, "folder to write", flag_values=values)
    flags.DEFINE_integer("show", 0, "programs to print", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("seed", 0, "which programs are printed", flag_values=values)
    flags.DEFINE_bool("allow_unsandboxed", False, "as executor.allow_unsandboxed of a config", flag_values=values)
    datasets = parse_flags(argv, values)
    known = ("gsm8k", "svamp", "mathqa", "mathqa-numeric", "weights")
    if len(datasets) != 1 or datasets[0] not in known:
        raise InputError(
            f"convert takes one dataset of {', '.join(known[:-1])}, or weights: python -m reft_jax convert gsm8k "
            "--in=FILE …"
        )
    if not values["out-dir"].value:
        raise InputError("--out-dir is missing; see python -m reft_jax --help")
    source = values["in"].value or ("openai/gsm8k" if datasets[0] == "gsm8k" else "")
    if not source:
        what = "folder with pytorch_model*.bin" if datasets == ["weights"] else f"file of {datasets[0]}"
        raise InputError(f"--in is missing: name the {what}")
    if datasets == ["weights"]:
        from reft_jax.commands.convert_weights import run_convert_weights

        run_convert_weights(Path(source), Path(values["out-dir"].value))
        return
    from reft_jax.commands.convert import run_convert

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
