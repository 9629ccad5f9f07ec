"""The commands: one row for each, and one more for each form of a command that has other flags or inputs."""

import os
from pathlib import Path
from typing import NamedTuple

from reft_jax.commands.flags import CONFIG, PATHS, Flag, entry
from reft_jax.config import flatten
from reft_jax.settings import SETTINGS, Config

RANKED = ("sft", "reft", "self_train_offline", "self_train_online")
POLICIES = ("warmup", *RANKED)
FORMATS, TEMPLATES = ("python", "nl"), ("method", "chat")
DTYPES = ("float32", "bfloat16", "float16")
DATASETS = ("gsm8k", "svamp", "mathqa", "mathqa-numeric")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft_jax" / "plan"

WORKDIR = (
    Flag("workdir", Path, None, "folder for everything that this run writes; all hosts must see it", required=True),
    Flag("allow_config_change", list, [], "settings you changed on purpose, e.g. rl.iterations"),
)
HOSTS = (
    Flag("coordinator", str, None, "address of host 0; not needed on a TPU pod or under srun", takes="HOST:PORT"),
    Flag("num_processes", int, None, "number of hosts, with --coordinator", low=1),
    Flag("process_id", int, None, "number of this host, from 0, with --coordinator", low=0),
)
BOTH_READINGS = Flag("both_readings", bool, False, "also read the answers in the other way (strict, lenient)")
FAMILY = Flag(
    "family", str, "", "a model family of your own, as model.family; if left out, by model_type", takes="FILE:NAME"
)
UNSANDBOXED = Flag("allow_unsandboxed", bool, False, "run programs even if they can read this machine's files")


def _model(names: tuple[str, ...]) -> Flag:
    return Flag("model", names, None, "a model of the work directory", required=True, to="name")


def _out(help: str, **more) -> Flag:
    return Flag("out_dir", Path, None, help, old=("out",), **more)


class Command(NamedTuple):
    """A row of the table.

    name: the command; for a second form of it, the flag or argument that selects the form follows. calls:
    module:function, with flags in braces. The module is imported when the command runs: --help and a wrong command line
    then need no long imports. gets: what the function is given besides `flags`: `run` (an opened work directory), or
    some of `config`, `file` (the text of --config), `workdir` and `allowed` (--allow_config_change).
    argument: the one argument that is not a flag, its name in capitals. needs: models that earlier stages must have
    made, with flags in braces. read_only: the command writes nothing into the work directory, so it may run while
    another one does. verdict: its function returns whether all is well; if not, the exit code is 1.
    """

    name: str
    help: str
    calls: str
    gets: tuple[str, ...] = ("run",)
    flags: tuple[Flag, ...] = ()
    argument: Flag | None = None
    needs: tuple[str, ...] = ()
    read_only: bool = False
    verdict: bool = False

    @property
    def command(self) -> str:
        return self.name.split()[0]

    @property
    def form(self) -> str:
        """What selects this form of the command; "" for its first form."""
        return self.name.partition(" ")[2]

    @property
    def on_hosts(self) -> bool:
        """Whether several hosts can run it together."""
        return "run" in self.gets or {"config", "workdir"} <= set(self.gets)

    @property
    def all_flags(self) -> tuple[Flag, ...]:
        config = (CONFIG,) if set(self.gets) - {"workdir"} else ()
        workdir = (*WORKDIR, *HOSTS) if self.on_hosts else WORKDIR[:1] if "workdir" in self.gets else ()
        return (*self.flags, *config, *workdir)


TABLE = (
    Command("pipeline", "all stages in order: SFT, ReFT, samples, rerankers, then the table; skips what is done",
            "reft_jax.commands.pipeline:run_pipeline",
            flags=(Flag("baselines", bool, False, "also self-training, offline and online"),)),
    Command("sft", 'supervised fine-tuning; makes the models "warmup" and "sft"', "reft_jax.stages.sft:run_sft"),
    Command("reft", 'reinforcement learning (rl.algorithm) from "warmup"; makes "reft"',
            "reft_jax.stages.reft:run_reft", needs=("warmup",)),
    Command("self-train", 'a baseline, self-training; makes "self_train_offline" or "self_train_online"',
            "reft_jax.stages.self_train:run_{kind}", needs=("warmup",),
            flags=(Flag("kind", ("offline", "online"), None, "which baseline", required=True, to=None),)),
    Command("sample", "draws several completions per question, executes and grades them",
            "reft_jax.stages.sample:run_sample", needs=("{model}",),
            flags=(_model(POLICIES), Flag("split", ("test", "train"), "test", "which questions"))),
    Command("rerank", 'trains a model\'s reranker; makes "rerank_MODEL"',
            "reft_jax.stages.rerank:run_rerank", needs=("warmup", "{model}"), flags=(_model(RANKED),)),
    Command("evaluate", "the table of all models in the work directory: report.md, .json and .html, curves.png",
            "reft_jax.commands.evaluate:run_evaluate", needs=("sft",), flags=(BOTH_READINGS,)),
    Command("evaluate --replay", "checks a run's rewards: grades every logged answer again; no model, no program",
            "reft_jax.run.executions:replay", gets=("workdir",), verdict=True,
            flags=(Flag("replay", bool, False, "selects this form", to=None),)),
    Command("evaluate --models", "a sweep: the table of many checkpoints on many data files",
            "reft_jax.commands.sweep:sweep", gets=("config", "workdir", "allowed"),
            flags=(Flag("models", str, "", "checkpoints: [NAME=]FOLDER[+RERANKER],…", required=True),
                   Flag("data", str, "", "data files: [NAME=]FILE,…; if left out, data.test"),
                   Flag("greedy", bool, False, "greedy answers only: no samples, so no voting and no reranker"))),
    Command("evaluate --samples", "tables from stored answers, graded again; no model, no config, no work directory",
            "reft_jax.commands.regrade:run_regrade", gets=(),
            flags=(Flag("samples", PATHS, None, "sample files, or folders of them", required=True, to="sources",
                        disk=True),
                   Flag("execute", bool, False, "run every program again"),
                   _out("folder for sweep.md and sweep.json; if left out, only prints", disk=True),
                   Flag("task", str, "", "what the questions ask for, as the setting `task`; if left out, by item id"),
                   Flag("reading", ("strict", "lenient"), "strict", "how answers are read, as data.reading"),
                   BOTH_READINGS,
                   Flag("seed", int, 42, "random seed for subsets and intervals", low=0), UNSANDBOXED)),
    Command("look", "a page to look at: table, curves, every answer, every rollout; report.html",
            "reft_jax.commands.look:run_look", gets=("workdir",), read_only=True,
            flags=(Flag("text", bool, False, "print one question's answers instead"),
                   Flag("item", str, "", "the question to print, e.g. gsm8k_12"),
                   Flag("iterations", str, "", "iterations whose rollouts the page shows; if left out, as many as fit",
                        takes="A-B"))),
    Command("export", "a model as a Hugging Face folder",
            "reft_jax.commands.export:run_export", needs=("{model}",), read_only=True,
            flags=(_model((*POLICIES, *(f"rerank_{name}" for name in RANKED))),
                   _out("folder to write", required=True, to="out", new=True),
                   Flag("dtype", DTYPES, None, "number format of the weights; if left out, the base model's"),
                   Flag("adapter", bool, False, "after LoRA: write the adapter as a PEFT folder, not a whole model"))),
    Command("check", "is a model ready for a run on this machine?",
            "reft_jax.commands.check:run_check", gets=("config",), verdict=True,
            flags=(Flag("model", Path, None, "Hugging Face folder", required=True, to="folder"),)),
    Command("check --workdir", "what will a run be on this machine: steps, rows, updates, files, memory, time",
            "reft_jax.commands.forecast:run_forecast", gets=("config", "workdir", "allowed"), verdict=True,
            flags=(Flag("stage", ("pipeline", "sft", "reft"), "pipeline", "which command the run is"),
                   Flag("baselines", bool, False, "of `pipeline --baselines`"))),
    Command("plan", "does a run fit a pod, and how fast can it be?",
            "reft_jax.commands.plan:run", gets=("config", "file"), verdict=True,
            flags=(Flag("topology", list, None, "pod, e.g. v5e:4x8 or v5p:4x4x4; several with --search, --grow", True),
                   Flag("search", bool, False, "rank meshes, micro-batches and remat, and compile the best"),
                   Flag("grow", int, 0, "chips that the config is for: each pod gets batches in proportion; 0: no",
                        low=0),
                   Flag("json", bool, False, "print JSON"),
                   Flag("questions", int, 7473, "questions in an epoch (GSM8K has 7473)", low=1),
                   Flag("into", str, "", "file to write the tables into, between its lines <!-- plan … --> and "
                        "<!-- end -->"),
                   Flag("cache", str, str(CACHE), "folder that keeps what was compiled"))),
    Command("solve", "the answer of one model to one question",
            "reft_jax.commands.solve:run_solve", gets=(),
            argument=Flag("QUESTION", str, None, "in quotes", to="question"),
            flags=(Flag("model", Path, None, "Hugging Face folder, or RUN/models/NAME", required=True, to="folder"),
                   Flag("format", FORMATS, None, "answer format: programs or text; if left out, the run's, else python",
                        to="answer_format", old=("engine",)),
                   Flag("task", str, None, "what the question asks for, as the setting `task`; if left out, the run's, "
                        "else a number"),
                   Flag("template", TEMPLATES, None, "prompt, as data.template; if left out, the run's, else method"),
                   Flag("system", str, None, "system prompt of the chat template; if left out, the run's"), FAMILY,
                   Flag("max_len", int, 512, "tokens of prompt and answer", low=1), UNSANDBOXED)),
    Command("convert", "training files from published data",
            "reft_jax.commands.convert:run_convert", gets=(),
            argument=Flag("DATASET", DATASETS, None, "which published data", to="dataset"),
            flags=(Flag("in", str, None, "file, hub:owner/name:split or hub:owner/name/config:split; "
                        "gsm8k: openai/gsm8k if left out", to="source"),
                   _out("folder to write", required=True, disk=True),
                   Flag("show", int, 0, "print this many programs, drawn at random", low=0),
                   Flag("seed", int, 0, "random seed for --show"), UNSANDBOXED)),
    Command("convert weights", "writes the weights of pytorch_model*.bin files as a folder with safetensors",
            "reft_jax.commands.convert_weights:run_convert_weights", gets=(),
            flags=(Flag("in", Path, None, "folder with pytorch_model*.bin", required=True, to="source", disk=True),
                   _out("folder to write", required=True, disk=True))),
    Command("convert adapter", "writes a base model and a PEFT adapter of it (LoRA) as one folder",
            "reft_jax.commands.convert_adapter:run_convert_adapter", gets=(),
            flags=(Flag("in", Path, None, "folder of the adapter", required=True, to="source", disk=True),
                   Flag("base", Path, None, "Hugging Face folder of its base model", required=True, disk=True),
                   _out("folder to write", required=True, disk=True), FAMILY)),
)  # fmt: skip
COMMANDS = list(dict.fromkeys(row.command for row in TABLE))

OVERVIEW = """python -m reft_jax COMMAND [--flag=VALUE …]

{commands}

COMMAND --help lists the flags of a command; --version prints versions. The same command resumes a run that was stopped.
On several hosts, every host runs the same command (docs/pods.md).

Exit codes: 0 done; 1 a check failed, or an unexpected error; 2 wrong input; 3 a number was NaN or infinite, and what
made it is saved, or the sampler gap is too large (rl.max_gap); 4 the disk is full or cannot be written, or the bucket
does not answer; 75 stopped by SIGTERM or SIGINT with everything saved: run it again. A second signal (with several
hosts only a second Ctrl-C) ends the process at once: 128 + its number."""


def overview() -> str:
    """What `--help` prints: a line per row of the table."""
    return OVERVIEW.format(commands="\n".join(entry(row.name, row.help) for row in TABLE))


def described(rows: list[Command], config: Config | None = None) -> str:
    """What `COMMAND --help` prints: the forms of the command and their flags; with a config, also its settings."""
    parts, shown = [], []
    for row in rows:
        argument, models = row.argument, ", ".join(name.replace("{model}", "that of --model") for name in row.needs)
        name = f" {argument.name}" if argument else ""
        parts.append(f"python -m reft_jax {row.name}{name} [--flag=VALUE …]")
        parts.append(row.help + (f"\nReads models of the work directory: {models}" if models else ""))
        lines = [argument.shown()] if argument else []
        lines += [flag.shown() for flag in row.all_flags if flag not in shown]
        if CONFIG in row.all_flags and CONFIG not in shown:
            lines.append(entry("--config.KEY=VALUE", "changes one setting; add --config=FILE to --help to list them"))
        if again := [f"--{flag.name}" for flag in row.all_flags if flag in shown]:
            lines.append(entry("as above", ", ".join(again)))
        parts.append("\n".join(lines))
        shown += row.all_flags
    if config:
        told = {f"--config.{key}={value}": SETTINGS[key] for key, value in flatten(config).items()}
        parts.append("\n".join(entry(text, one.doc + one.rule.in_brackets) for text, one in told.items()))
    return "\n\n".join(parts)
