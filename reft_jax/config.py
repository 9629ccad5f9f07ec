"""The settings of a run: read from a file, changed, checked, and frozen before anything compiles.

A file in configs/ defines `get_config()`: it takes `default_config()`, changes what it needs and returns it. The
command line changes single values: `--config.rl.kl_coef=0.05`. `check_config` gives the dataclasses of
reft_jax/settings.py, which has every default and meaning. Files are read here and flags in commands/flags.py, not by
`config_flags` of ml_collections or by tyro: these check types only, and answer a mistake in a file with a traceback.
"""

import difflib
import json
import linecache
import re
import runpy
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from reft_jax.settings import SETTINGS, Config
from reft_jax.types import InputError

# Old names of settings and sections. They are refused with the new name; a config.json with them is still read.
RENAMED = {"ppo": "rl", "ppo.prompts": "rl.questions", "data.engine": "data.format"}


def renamed(key: str) -> str | None:
    """The new name of an old setting or section; None if `key` never was one."""
    section, dot, name = key.partition(".")
    moved = f"{RENAMED.get(section)}{dot}{name}"
    return RENAMED.get(key) or (moved if moved in SETTINGS else None)


def default_config() -> ConfigDict:
    """The paper's settings, every key of SETTINGS. Any key and value can be set: `check_config` says what is wrong.

    Old sections are there too, empty, so that a key that is set in one can be refused by its name.
    """
    sections = {key.rpartition(".")[0] for key in SETTINGS} | {key for key in RENAMED if "." not in key}
    config = ConfigDict({name: {} for name in sections if name}, type_safe=False)
    config.update_from_flattened_dict({key: one.default for key, one in SETTINGS.items()})
    return config


def flatten(config) -> dict[str, Any]:
    """{'rl.kl_coef': 0.01, …} of a Config or of a ConfigDict, sorted."""
    flat = {}
    for key, value in sorted(vars(config).items() if is_dataclass(config) else config.items()):
        if is_dataclass(value) or isinstance(value, ConfigDict | FrozenConfigDict):
            flat |= {f"{key}.{name}": one for name, one in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def replaced(config, changes: Mapping[str, Any]) -> Config:
    """The config with other values of some keys, as {"mesh.fsdp": 8}; they are not checked."""
    return _tree(Config, flatten(config) | changes)


def _tree(kind: type, flat: Mapping[str, Any], prefix: str = ""):
    """The dataclass with the values of `flat`; a whole number becomes a float where one belongs."""
    return kind(
        **{
            one.name: one.type(flat[prefix + one.name]) if one.metadata else _tree(one.type, flat, f"{one.name}.")
            for one in fields(kind)
        }
    )


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


def check_values(config, source: str) -> dict[str, Any]:
    """The flat config, or InputError that names `source`, a key, its value and what is allowed."""
    flat = flatten(config)
    for key in flat:
        if new := renamed(key):
            raise InputError(f"{source}: {key} is now {new}")
        if key not in SETTINGS:
            raise InputError(f"{source}: unknown key {key!r}; did you mean {nearest(key, SETTINGS)!r}?")
    for key, setting in SETTINGS.items():
        if key not in flat:
            raise InputError(f"{source}: key {key!r} is missing; start from reft_jax.config.default_config()")
        value, kind = flat[key], type(setting.default)
        number = kind is float and type(value) is int
        if type(value) is not kind and not number:
            raise InputError(f"{source}: {key}={value!r} must be of type {kind.__name__}{setting.rule.in_brackets}")
        if not setting.rule.holds(value):
            raise InputError(f"{source}: {key}={value!r} is not allowed; it must be {setting.rule.allowed}")
    return flat


def check_config(config: ConfigDict | Config) -> Config:
    """The frozen config, with every value checked alone and with the others. InputError names the keys."""
    flat = check_values(config, "config")
    for key in ("model.path", "data.train", "data.test"):
        if not flat[key]:
            raise InputError(f"config: {key} is empty; it must be {SETTINGS[key].doc}")
    if ("toy" == flat["model.path"]) != ("toy" == flat["data.train"] == flat["data.test"]):
        raise InputError('config: "toy" must stand in model.path, data.train and data.test, or in none of them')
    for whole, part in (
        ("sft.batch_size", "sft.micro_batch"),
        ("rerank.batch_size", "rerank.micro_batch"),
    ):
        if flat[whole] % flat[part]:
            raise InputError(f"config: {whole}={flat[whole]} must be a multiple of {part}={flat[part]}")
    questions, samples, parts = flat["rl.questions"], flat["rl.samples"], flat["rl.minibatches"]
    known = samples or flat["rl.algorithm"] == "ppo"  # else the algorithm's number: make_algorithm checks it
    if questions % parts or (known and questions * (samples or 1) % (parts * flat["rl.micro_batch"])):
        rows = f"rl.questions={questions}" + f" * rl.samples={samples}" * (samples > 0)
        raise InputError(
            f"config: {rows} must be a multiple of rl.minibatches={parts} * rl.micro_batch={flat['rl.micro_batch']}, "
            "and rl.questions of rl.minibatches"
        )
    if flat["sft.warmup_epoch"] > (flat["sft.stop_epoch"] or flat["sft.epochs"]):
        raise InputError("config: sft.warmup_epoch must not be later than the last epoch of the run")
    if flat["sft.stop_epoch"] > flat["sft.epochs"]:
        raise InputError("config: sft.stop_epoch must not be later than sft.epochs, where the schedule ends")
    if flat["toy.hidden_size"] % (2 * flat["toy.heads"]):
        raise InputError("config: toy.hidden_size must be a multiple of 2 * toy.heads")
    if flat["rl.max_prompt"] >= flat["rl.max_len"]:
        raise InputError("config: rl.max_prompt must be smaller than rl.max_len")
    return _tree(Config, flat)


def load_config(source: str) -> ConfigDict:
    """What `get_config()` of FILE returns, or `get_config("argument")` if `source` is FILE:argument."""
    path, *argument = source.split(":", 1)
    if not Path(path).is_file():
        raise InputError(f"--config: there is no file {path}; configs/ holds the ones that come with the project")
    try:
        names = runpy.run_path(path)
        config = names["get_config"](*argument) if "get_config" in names else None
    except Exception as error:  # the file is Python: anything can be raised in it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        for key in re.findall(r"config\.(\w+(?:\.\w+)?)", linecache.getline(path, lines[-1]) if lines else ""):
            for old in (key, key.partition(".")[0]):  # one that is read: it is not there
                if new := renamed(old):
                    raise InputError(f"{where}: {old} is now {new}") from error
        raise InputError(f"{where}: {type(error).__name__}: {error}; correct the file or its argument") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: must define get_config() that changes and returns reft_jax.config.default_config()")
    check_values(config, path)
    return ConfigDict(config, type_safe=False)  # a copy: the file's may be frozen


def to_json(config) -> str:
    """One sorted text for one config: written into the work directory and compared on resume."""
    return json.dumps(flatten(config), indent=1, sort_keys=True)
