"""Every setting of a run: its default, what is allowed, and what it means. Checked and frozen before anything compiles.

A file in configs/ defines `get_config()`: it takes `default_config()`, changes what it needs and returns it. The
command line changes single values: `--config.rl.kl_coef=0.05`. Defaults are the paper's (CodeLlama-7B, GSM8K).
"""

import difflib
import json
import math
import runpy
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from reft_jax.types import InputError


class Rule(NamedTuple):
    """What a value may be: `allowed` is the text shown to the user when `holds(value)` is false."""

    allowed: str
    holds: Callable[[Any], bool]


class Setting(NamedTuple):
    default: Any
    rule: Rule
    doc: str


def at_least(low) -> Rule:
    return Rule(f"a number >= {low}", lambda v: low <= v < math.inf)


def between(low, high) -> Rule:
    return Rule(f"a number from {low} to {high}", lambda v: low <= v <= high)


def one_of(*values) -> Rule:
    return Rule("one of " + ", ".join(map(str, values)), lambda v: v in values)


POSITIVE = Rule("a number > 0", lambda v: 0 < v < math.inf)
MULTIPLE_OF_32 = Rule("a multiple of 32", lambda v: v > 0 and v % 32 == 0)
ANY = Rule("any", lambda v: True)

SETTINGS = {
    "name": Setting("reft", ANY, "title of the report"),
    "seed": Setting(42, at_least(0), "initial heads, data order and sampling are functions of it"),
    "task": Setting("", ANY, 'what questions ask for: "" by item id, a name of tasks/registry.py, or path.py:NAME'),
    "tracking": Setting(
        "jsonl,tensorboard",
        Rule(
            "names of trackers with commas between, jsonl among them", lambda v: "jsonl" in map(str.strip, v.split(","))
        ),
        "where metrics go: names of train/trackers.py and path.py:NAME; jsonl is needed to resume",
    ),
    "compiled": Setting("", ANY, "folder that keeps compiled programs; empty: compiled/ in the work directory"),
    "keep_steps": Setting(2, POSITIVE, "saved steps of a running stage that are kept: with 2 one may be damaged"),
    "watchdog_minutes": Setting(
        60.0, at_least(0), "end the process if no decode chunk, program or update ends for so long; 0: never"
    ),
    # Model: a folder in Hugging Face format, or "toy": a tiny Llama made from the seed.
    "model.path": Setting("", ANY, 'folder with config.json, *.safetensors and tokenizer files, or "toy"'),
    "model.dtype": Setting("bfloat16", one_of("bfloat16", "float32"), "compute dtype; master weights are float32"),
    "model.remat": Setting("full", one_of("none", "dots", "full"), "what the backward pass recomputes"),
    # Data: JSON files, `hub:owner/name:split`, or "toy": generated word problems.
    "data.train": Setting("", ANY, 'training file, hub name or "toy"'),
    "data.test": Setting("", ANY, 'test file, hub name or "toy"'),
    "data.dev": Setting("", ANY, 'file that chooses checkpoints; "" holds out dev_rows training questions instead'),
    "data.dev_rows": Setting(0, at_least(0), "training questions held out when dev is empty; 0: the test file chooses"),
    "data.format": Setting("python", one_of("python", "nl"), "solutions are programs or text"),
    "data.train_limit": Setting(0, at_least(0), "use the first rows of a seeded shuffle of the training file; 0: all"),
    "data.test_limit": Setting(0, at_least(0), "the same for the test file"),
    "data.max_dropped": Setting(0.2, between(0, 1), "largest share of rows that a length limit may drop"),
    "data.pad_multiple": Setting(
        64, MULTIPLE_OF_32, "row lengths are padded up to a multiple of this, to compile few shapes"
    ),
    # The embedded default. A toy for the machinery.
    "toy.train_rows": Setting(2000, POSITIVE, "generated training questions"),
    "toy.dev_rows": Setting(300, POSITIVE, "generated questions that choose checkpoints"),
    "toy.test_rows": Setting(500, POSITIVE, "generated test questions"),
    "toy.skipped_share": Setting(0.3, between(0, 1), "share of annotations that skip steps and write a value down"),
    "toy.drop_skipped": Setting(False, ANY, "train SFT on the good annotations only (a control)"),
    "toy.vocab_size": Setting(1000, between(300, 50000), "byte-level BPE trained on the generated text"),
    "toy.layers": Setting(3, POSITIVE, "of the tiny Llama"),
    "toy.hidden_size": Setting(64, POSITIVE, "of the tiny Llama"),
    "toy.mlp_size": Setting(176, POSITIVE, "of the tiny Llama"),
    "toy.heads": Setting(4, POSITIVE, "of the tiny Llama; also its kv heads"),
    # Supervised fine-tuning: one run makes the warm-up model (an early epoch) and the best checkpoint.
    "sft.epochs": Setting(40, POSITIVE, "length of the run and of its schedule"),
    "sft.stop_epoch": Setting(0, at_least(0), "stop here although the schedule runs to `epochs`; 0: at its end"),
    "sft.warmup_epoch": Setting(2, POSITIVE, "ReFT, its reference and the reranker's samples start from this epoch"),
    "sft.batch_size": Setting(48, POSITIVE, "rows an update"),
    "sft.micro_batch": Setting(48, POSITIVE, "rows in memory at once; gradients are summed over micro-batches"),
    "sft.learning_rate": Setting(1e-5, POSITIVE, "peak"),
    "sft.lr_warmup": Setting(0.1, between(0, 1), "share of the updates that warm up linearly, then linear decay to 0"),
    "sft.weight_decay": Setting(0.0, at_least(0), "AdamW"),
    "sft.clip_norm": Setting(1.0, POSITIVE, "largest gradient norm"),
    "sft.max_len": Setting(1024, POSITIVE, "tokens of prompt and target; longer rows are dropped"),
    "sft.eval_every": Setting(1, POSITIVE, "epochs between greedy evaluations"),
    # Reinforcement learning
    "rl.algorithm": Setting("ppo", ANY, "ppo, or path.py:NAME: a subclass of algo.algorithms.Algorithm"),
    "rl.iterations": Setting(0, at_least(0), "0: as many as `epochs` passes over the training questions"),
    "rl.epochs": Setting(300, POSITIVE, "passes over the training questions, when iterations is 0"),
    "rl.questions": Setting(32, POSITIVE, "questions an iteration, one sample each"),
    "rl.micro_batch": Setting(32, POSITIVE, "rows in memory at once in scoring and updates"),
    "rl.minibatches": Setting(1, POSITIVE, "updates a PPO epoch"),
    "rl.ppo_epochs": Setting(2, POSITIVE, "passes over the rows of an iteration"),
    "rl.learning_rate": Setting(3e-7, POSITIVE, "constant after lr_warmup"),
    "rl.lr_warmup": Setting(0, at_least(0), "updates of linear warm-up"),
    "rl.weight_decay": Setting(0.0, at_least(0), "AdamW"),
    "rl.clip_norm": Setting(1.0, POSITIVE, "largest gradient norm"),
    "rl.kl_coef": Setting(0.01, at_least(0), "β of the KL reward; the paper: 0.05 for nl, but 0.01 for MathQA-numeric"),
    "rl.gamma": Setting(1.0, between(0, 1), "discount"),
    "rl.lam": Setting(0.95, between(0, 1), "λ of GAE"),
    "rl.vf_coef": Setting(5.0, at_least(0), "weight of the value loss"),
    "rl.value_init": Setting(1.0, at_least(0), "scale of the value head's initial weights; 0 begins with V = 0"),
    "rl.clip": Setting(0.2, POSITIVE, "policy ratio"),
    "rl.value_clip": Setting(0.2, POSITIVE, "value change"),
    "rl.temperature": Setting(1.0, POSITIVE, "of sampling and of every log-probability"),
    "rl.max_prompt": Setting(300, POSITIVE, "tokens; training questions with a longer prompt are skipped"),
    "rl.max_len": Setting(700, POSITIVE, "tokens of prompt and response"),
    "rl.eval_every": Setting(
        0, at_least(0), "iterations between greedy evaluations; 0: once a pass over the questions"
    ),
    "rl.save_every": Setting(0, at_least(0), "iterations between resumable checkpoints; 0: once a pass"),
    # Self-training, the paper's two baselines. What is not here is as in `sft` (offline) and `rl` (online).
    "self_train.samples": Setting(10, POSITIVE, "offline: distinct correct samples a question, beside its solution"),
    "self_train.epochs": Setting(20, POSITIVE, "offline: length of the run and of its schedule"),
    "self_train.updates": Setting(2, POSITIVE, "online: updates on each batch"),
    "self_train.learning_rate": Setting(3e-7, POSITIVE, "online: constant after rl.lr_warmup"),
    # Sampling for voting, reranking and offline self-training
    "sample.n": Setting(100, POSITIVE, "completions a test question"),
    "sample.train_n": Setting(100, POSITIVE, "completions a training question, for the reranker and self-training"),
    "sample.train_limit": Setting(0, at_least(0), "training questions sampled for these; 0: all"),
    "sample.temperature": Setting(1.0, POSITIVE, "of sampling for voting and reranking"),
    "sample.top_k": Setting(50, at_least(0), "0: the whole vocabulary"),
    "sample.max_len": Setting(1024, POSITIVE, "tokens of prompt and response, also of greedy evaluation"),
    # Rollout engine
    "engine.slots": Setting(128, POSITIVE, "completions decoded at once, in rollouts, evaluation and sampling"),
    # Reranker
    "rerank.epochs": Setting(3, POSITIVE, "passes over the deduplicated samples"),
    "rerank.batch_size": Setting(24, POSITIVE, "rows an update"),
    "rerank.micro_batch": Setting(24, POSITIVE, "rows in memory at once"),
    "rerank.learning_rate": Setting(1e-6, POSITIVE, "peak"),
    "rerank.lr_warmup": Setting(
        0.1, between(0, 1), "share of the updates that warm up linearly, then linear decay to 0"
    ),
    "rerank.weight_decay": Setting(0.0, at_least(0), "AdamW"),
    "rerank.clip_norm": Setting(1.0, POSITIVE, "largest gradient norm"),
    "rerank.max_len": Setting(700, POSITIVE, "tokens of prompt and completion; longer rows are dropped"),
    # Executor
    "executor.timeout_s": Setting(10.0, POSITIVE, "wall-clock seconds a program"),
    "executor.workers": Setting(2, POSITIVE, "programs run at once"),
    "executor.memory_mb": Setting(1024, at_least(64), "address space a program, MiB"),
    "executor.program_kb": Setting(64, POSITIVE, "size of a program, KiB; a longer one is not run"),
    "executor.allow_unsandboxed": Setting(False, ANY, "run programs where they can read this machine's files"),
    # Mesh
    "mesh.data": Setting(-1, at_least(-1), "replicas; -1 takes the devices that are left"),
    "mesh.fsdp": Setting(1, at_least(1), "shards of parameters and rows"),
    "mesh.tensor": Setting(1, at_least(1), "shards of heads, mlp and vocabulary"),
    "mesh.cpu_devices": Setting(0, at_least(0), "split the CPU into this many virtual devices; 0: leave it alone"),
}


def default_config() -> ConfigDict:
    """The paper's settings, every key of SETTINGS. Any key and value can be set: `check_config` says what is wrong."""
    config = ConfigDict(type_safe=False)
    for key, setting in SETTINGS.items():
        *sections, field = key.split(".")
        section = config
        for name in sections:
            if name not in section:
                section[name] = ConfigDict(type_safe=False)
            section = section[name]
        section[field] = setting.default
    return config


def flatten(config) -> dict[str, Any]:
    """{'rl.kl_coef': 0.01, …}"""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | FrozenConfigDict):
            flat |= {f"{key}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that was probably meant.

    First those whose last part is that of `name`, begins with it, or has words with these initials (lr); of these the
    same section is preferred. Else the one that is spelled most alike.
    """
    section, _, field = name.rpartition(".")

    def closeness(key: str) -> tuple:
        its_section, _, its_field = key.rpartition(".")
        initials = "".join(word[:1] for word in its_field.split("_"))
        meant = its_field == field or (len(field) > 1 and (initials == field or its_field.startswith(field)))
        spelled = difflib.SequenceMatcher(None, name, key).ratio()
        return meant, meant and its_section == section, meant and initials == field, spelled

    return max(sorted(names), key=closeness)


def check_values(config: ConfigDict, source: str) -> dict[str, Any]:
    """The flat config, or InputError that names `source`, a key, its value and what is allowed."""
    flat = flatten(config)
    for key in flat:
        if key not in SETTINGS:
            raise InputError(f"{source}: unknown key {key!r}; did you mean {nearest(key, SETTINGS)!r}?")
    for key, setting in SETTINGS.items():
        if key not in flat:
            raise InputError(f"{source}: key {key!r} is missing; start from reft_jax.config.default_config()")
        value, kind = flat[key], type(setting.default)
        number = kind is float and type(value) is int
        if type(value) is not kind and not number:
            raise InputError(f"{source}: {key}={value!r} must be of type {kind.__name__} ({setting.rule.allowed})")
        if not setting.rule.holds(value):
            raise InputError(f"{source}: {key}={value!r} is not allowed; it must be {setting.rule.allowed}")
    return flat


def check_config(config: ConfigDict) -> FrozenConfigDict:
    """The frozen config, every value checked alone and with the others; InputError names the keys."""
    flat = check_values(config, "config")
    for key in ("model.path", "data.train", "data.test"):
        if not flat[key]:
            raise InputError(f"config: {key} is empty; it must be {SETTINGS[key].doc}")
    if ("toy" == flat["model.path"]) != ("toy" == flat["data.train"] == flat["data.test"]):
        raise InputError('config: "toy" must stand in model.path, data.train and data.test, or in none of them')
    for whole, *parts in (
        ("sft.batch_size", "sft.micro_batch"),
        ("rerank.batch_size", "rerank.micro_batch"),
        ("rl.questions", "rl.minibatches", "rl.micro_batch"),
    ):
        if flat[whole] % math.prod(flat[part] for part in parts):
            product = " * ".join(f"{part}={flat[part]}" for part in parts)
            raise InputError(f"config: {whole}={flat[whole]} must be a multiple of {product}")
    if flat["sft.warmup_epoch"] > (flat["sft.stop_epoch"] or flat["sft.epochs"]):
        raise InputError("config: sft.warmup_epoch must not be later than the last epoch of the run")
    if flat["sft.stop_epoch"] > flat["sft.epochs"]:
        raise InputError("config: sft.stop_epoch must not be later than sft.epochs, where the schedule ends")
    if flat["toy.hidden_size"] % (2 * flat["toy.heads"]):
        raise InputError("config: toy.hidden_size must be a multiple of 2 * toy.heads")
    if flat["rl.max_prompt"] >= flat["rl.max_len"]:
        raise InputError("config: rl.max_prompt must be smaller than rl.max_len")
    return FrozenConfigDict(config)


def parse_flags(argv: list[str], flag_values: flags.FlagValues) -> list[str]:
    """Sets `flag_values` from `argv` (program name first) and returns the arguments that are not flags."""
    try:
        return flag_values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        close = nearest(error.flagname, flag_values)
        raise InputError(f"unknown flag --{error.flagname}; did you mean --{close}?") from error
    except flags.Error as error:
        raise InputError(f"{error}; see python -m reft_jax --help and reft_jax/config.py") from error


def parse_config(argv: list[str], flag_values: flags.FlagValues) -> FrozenConfigDict:
    """Reads `--config=FILE[:argument]` and its overrides out of `argv`, with the other flags of `flag_values`."""
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    flags.DEFINE_string("config", None, "config file, as configs/quickstart.py", flag_values=flag_values)
    for key, setting in SETTINGS.items():
        define[type(setting.default)](f"config.{key}", None, setting.doc, flag_values=flag_values)
    if extra := parse_flags(argv, flag_values):
        raise InputError(f"unexpected argument {extra[0]!r}; flags are written --name=value")
    if not flag_values.config:
        raise InputError("--config=FILE is missing; configs/quickstart.py is the embedded default")
    config = load_config(flag_values.config)
    overrides = {key: flag_values[f"config.{key}"].value for key in SETTINGS}
    config.update_from_flattened_dict({key: value for key, value in overrides.items() if value is not None})
    return check_config(config)


def load_config(source: str) -> ConfigDict:
    """What `get_config()` of FILE returns, or `get_config("argument")` if `source` is FILE:argument."""
    path, *argument = source.split(":", 1)
    if not Path(path).is_file():
        raise InputError(f"--config: there is no file {path}; configs/ holds the ones that come with the project")
    try:
        names = runpy.run_path(path)
        config = names["get_config"](*argument) if "get_config" in names else None
    except Exception as error:  # the file is a program: anything can be raised in it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise InputError(f"{where}: {type(error).__name__}: {error}; correct the file or its argument") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: must define get_config() that changes and returns reft_jax.config.default_config()")
    check_values(config, path)
    return ConfigDict(config, type_safe=False)  # a copy: the file's may be frozen


def to_json(config) -> str:
    """One sorted text for one config: written into the work directory and compared on resume."""
    return json.dumps(flatten(config), indent=1, sort_keys=True)
