"""The console script `reft`, also `python -m reft_jax`: runs a row of commands/table.py; exit codes."""

import importlib
import os
import sys
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

from absl import flags

from reft_jax import terminal
from reft_jax.commands.flags import CONFIG, config_of, define_settings, no_arguments, parse_config, parse_flags
from reft_jax.commands.table import COMMANDS, HOSTS, TABLE, Command, described, overview
from reft_jax.config import check_keys
from reft_jax.model_folder import check_new_folder
from reft_jax.store import unforeseen, with_origins
from reft_jax.types import InputError, NotFiniteError, SamplerGapError, SaveError, Stopped


def main() -> None:
    """The console script `reft`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    sys.modules.setdefault("torch", None)  # where it is installed, libraries would import it: half of a start's time
    terminal.prepare()
    try:
        with terminal.one_line_on_ctrl_c():
            try:
                run_command(sys.argv[1:])
            finally:
                terminal.BLOCK.settle()
        sys.stdout.flush()  # here, where a full disk is still an error of ours
    except Stopped as stop:
        print(f"stopped by {stop}; everything done so far is saved, and the same command resumes", file=sys.stderr)
        sys.exit(stop.exit_code)
    except (InputError, NotFiniteError, SamplerGapError, SaveError) as error:
        end(error.exit_code, error)
    except OSError as error:
        if (told := unforeseen(error)) is None:
            raise
        end(told.exit_code, told)
    except KeyboardInterrupt:
        os._exit(terminal.INTERRUPTED)  # a normal exit would wait for threads, and these wait for programs


def end(code: int, error) -> NoReturn:
    print("error:", with_origins(" ".join(str(error).splitlines())), file=sys.stderr)
    sys.exit(code)


def run_command(argv: list[str]) -> None:
    """Parses the flags of one command and runs it. Raises InputError before anything is compiled or written."""
    if not argv or argv[0] in ("help", "-h", "--help"):
        print(overview())
        return
    if argv[0] in ("--version", "version"):
        from reft_jax.run.about import commit, versions

        made_of = ", ".join(f"{name} {number}" for name, number in versions().items() if name != "reft_jax")
        print(f"reft_jax {versions()['reft_jax']}{f' ({commit()})' if commit() else ''}\n{made_of}")
        return
    rows = [row for row in TABLE if row.command == argv[0]]
    if not rows:
        raise InputError(f"unknown command {argv[0]!r}; commands: {', '.join(COMMANDS)}")
    if {"-h", "--help"} & set(argv):
        settings = [word for word in argv if word.lstrip("-").startswith("config")]
        print(described(rows, parse_config(["reft", *settings]) if settings else None))
        return
    row, values, given = parse(rows, argv)
    result = run_row(row, values, given)
    if row.verdict and not result:
        sys.exit(1)


def parse(rows: list[Command], argv: list[str]) -> tuple[Command, flags.FlagValues, dict[str, Any]]:
    """The row that a command line selects, the values of its flags, and the arguments of its function. InputError."""
    values, declared = flags.FlagValues(), {flag.name: flag for row in rows for flag in row.all_flags}
    for flag in declared.values():
        flag.define(values)
    if "config" in declared:
        define_settings(values)
    words = parse_flags(argv, values, declared.values())
    row = next((row for row in rows[1:] if _selects(row.form, values, words)), rows[0])
    help = f"see python -m reft_jax {row.command} --help"
    mine = {flag.name for flag in row.all_flags}
    for name in values:
        if values[name].present and name.partition(".")[0] not in mine:
            other = next(one.name for one in rows if name.partition(".")[0] in {flag.name for flag in one.all_flags})
            raise InputError(f"--{name} is a flag of `{other}`, not of `{row.name}`; {help}")
    for flag in row.all_flags:
        if flag.required and flag is not CONFIG and not values[flag.name].value:
            raise InputError(f"--{flag.name} is missing; {help}")
    given = {flag.to or flag.name: flag.value(values) for flag in row.flags if flag.to is not None}
    if row.argument:
        kinds = (*(row.argument.kind if isinstance(row.argument.kind, tuple) else ()), *(one.form for one in rows[1:]))
        if len(words) != 1 or not words[0].strip() or (kinds and words[0] not in kinds):
            of = f" of {', '.join(kinds)}" if kinds else ", in quotes"
            raise InputError(f"{row.command} takes one {row.argument.to}{of}; {help}")
        given[row.argument.to] = words[0]
    else:
        no_arguments(words[1:] if [row.form] == words[:1] else words)
    return row, values, given


def _selects(form: str, values: flags.FlagValues, words: list[str]) -> bool:
    if not form.startswith("--"):
        return words[:1] == [form]
    flag = values[form.removeprefix("--")]
    return flag.value if flag.boolean else bool(flag.present)


def run_row(row: Command, values: flags.FlagValues, given: dict[str, Any]) -> Any:
    """Runs a command with what its row says that it needs, and returns what its function returns."""
    said = {flag.name: flag.value(values) for flag in row.all_flags}
    opened = said | {"file": said.get("config"), "allowed": said.get("allow_config_change", [])}
    check_keys(opened["allowed"], "--allow_config_change")
    if "config" in said:
        opened["config"] = config_of(values)
    with ExitStack() as stack:
        if row.on_hosts:
            from reft_jax.parallel import hosts  # imports JAX

            stack.enter_context(hosts.joined(*(said[flag.name] for flag in HOSTS)))
            for flag in row.flags:
                if flag.new:
                    hosts.from_first(flag.name, partial(check_new_folder, f"--{flag.name}", said[flag.name]))
        if "run" in row.gets:
            from reft_jax.run.open import open_run  # imports JAX

            needs, config = [name.format(**said) for name in row.needs], opened["config"]
            run = open_run(config, opened["workdir"], needs, opened["allowed"], read_only=row.read_only)
            opened["run"] = stack.enter_context(run)
        module, function = row.calls.format(**said).split(":")
        return getattr(importlib.import_module(module), function)(**{name: opened[name] for name in row.gets}, **given)


if __name__ == "__main__":
    main()
