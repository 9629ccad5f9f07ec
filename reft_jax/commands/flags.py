"""Flags of the command line: declared by commands/table.py, parsed with absl, refused in one line."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from reft_jax.commands.paths import listed
from reft_jax.config import check_config, load_config, nearest, renamed
from reft_jax.settings import SETTINGS, Config
from reft_jax.store import as_path, is_remote
from reft_jax.types import InputError

PATHS = "PATH,…"  # a kind of flag: paths with commas between
_VALUE = {str: "TEXT", int: "N", Path: "PATH", list: "A,B,…", PATHS: PATHS}
_DEFINE = {bool: flags.DEFINE_bool, float: flags.DEFINE_float, list: flags.DEFINE_list}  # others: as text


class Flag(NamedTuple):
    """One flag of a command: words are joined with `_`.

    kind: str, int, float, bool, list (with commas between), Path, PATHS, or a tuple of the allowed words. low: the
    smallest number. to: the parameter of the command's function, if it has another name; None: the function does not
    get it. new: a folder that must not exist yet or must be empty. old: former names, which are refused with the new
    one. takes: how --help writes its value, if not by its kind. disk: not in a bucket.
    """

    name: str
    kind: Any
    default: Any
    help: str
    required: bool = False
    low: int | None = None
    to: str | None = ""
    new: bool = False
    old: tuple[str, ...] = ()
    takes: str = ""
    disk: bool = False

    def define(self, values: flags.FlagValues) -> None:
        if isinstance(self.kind, tuple):
            flags.DEFINE_enum(self.name, self.default, self.kind, self.help, flag_values=values)
        elif self.kind is int:
            flags.DEFINE_integer(self.name, self.default, self.help, lower_bound=self.low, flag_values=values)
        else:
            define = _DEFINE.get(self.kind, flags.DEFINE_string)
            define(self.name, self.default, self.help, flag_values=values)

    def value(self, values: flags.FlagValues) -> Any:
        """The parsed value: a Path or a list of paths where the flag is one."""
        value = values[self.name].value
        paths = listed(value or "") if self.kind is PATHS else [value or ""]
        if self.disk and (remote := next((path for path in paths if is_remote(path)), None)):
            how = "copy it to one, or from one, with `gcloud storage cp -r`"
            raise InputError(f"--{self.name}: {remote} is in a bucket, and this command works on a disk; {how}")
        if self.kind is PATHS:
            return paths
        return as_path(value) if self.kind is Path and value else value

    def shown(self) -> str:
        """Its entry in a --help; a name in capitals is an argument."""
        kind = self.takes or ("|".join(self.kind) if isinstance(self.kind, tuple) else _VALUE.get(self.kind))
        default = str(self.default).lower() if self.kind is bool else self.default
        told = " (required)" if self.required else f" (default: {default})" if default not in (None, "", []) else ""
        if self.name.isupper():
            return entry(self.name, self.help + (f": {kind}" if kind and self.kind is not str else "") + told)
        return entry(f"--{self.name}" + (f"={kind}" if kind else ""), self.help + told)


def entry(left: str, text: str) -> str:
    """Two columns, 100 characters wide; a long left column has its text below it."""
    head = f"  {left:<24} " if len(left) <= 24 else f"  {left}\n{'':27}"
    return head + textwrap.fill(text, 73, break_on_hyphens=False, break_long_words=False).replace("\n", f"\n{'':27}")


def parse_flags(argv: list[str], values: flags.FlagValues, declared: Iterable[Flag] = ()) -> list[str]:
    """Sets `values` from `argv` (program name first) and returns the arguments that are not flags. InputError."""
    try:
        return values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        if new := _new_name(name, values, declared):
            raise InputError(f"--{name} is now --{new}") from error
        raise InputError(f"unknown flag --{name}; did you mean --{nearest(name, values)}?") from error
    except flags.Error as error:
        raise InputError(f"{error}; see python -m reft_jax COMMAND --help and reft_jax/settings.py") from error


def _new_name(name: str, values: flags.FlagValues, declared: Iterable[Flag]) -> str | None:
    section, _, key = name.partition(".")
    if section == "config" and (new := renamed(key)):
        return f"config.{new}"
    joined = name.replace("-", "_")
    return next((flag.name for flag in declared if name in flag.old), joined if joined in values else None)


CONFIG = Flag(
    "config", str, None, "settings: a Python file as in configs/", required=True, takes="FILE[:ARG]", disk=True
)


def define_settings(values: flags.FlagValues) -> None:
    """Defines a flag for every setting, `--config.KEY`."""
    for key, one in SETTINGS.items():
        Flag(f"config.{key}", type(one.default), None, one.doc).define(values)


def config_of(values: flags.FlagValues) -> Config:
    """The checked config of the parsed `--config=FILE[:argument]`, changed by `--config.KEY=VALUE`. InputError."""
    if not values.config:
        raise InputError("--config=FILE is missing; try --config=configs/quickstart.py, the toy example")
    config = load_config(values.config)
    overrides = {key: values[f"config.{key}"].value for key in SETTINGS}
    config.update_from_flattened_dict({key: value for key, value in overrides.items() if value is not None})
    return check_config(config)


def parse_config(argv: list[str]) -> Config:
    """`config_of` a command line (program name first) that has no other flags."""
    values = flags.FlagValues()
    CONFIG.define(values)
    define_settings(values)
    no_arguments(parse_flags(argv, values))
    return config_of(values)


def no_arguments(words: list[str]) -> None:
    """InputError if there are arguments."""
    if words:
        raise InputError(f"unexpected argument {words[0]!r}; flags are written --name=value, lists with commas")
