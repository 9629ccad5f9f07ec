"""The table of commands: what --help prints, that every flag is read and arrives, and which words are refused."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reft_jax import __main__
from reft_jax.commands import flags
from reft_jax.commands.table import COMMANDS, CONFIG, HOSTS, TABLE, WORKDIR, Command, described
from reft_jax.config import default_config
from reft_jax.settings import SETTINGS
from reft_jax.types import InputError

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "--config=configs/quickstart.py"
EXAMPLES = {str: "text", Path: "folder", list: "seed,name", flags.PATHS: "here,there", int: 7}
VALUES = {str: "text", Path: Path("folder"), list: ["seed", "name"], flags.PATHS: ["here", "there"], int: 7, bool: True}


def rows_of(row: Command) -> list[Command]:
    return [one for one in TABLE if one.command == row.command]


def example(flag: flags.Flag) -> str:
    if flag.kind is bool:
        return f"--{flag.name}"
    return f"--{flag.name}={flag.kind[-1] if isinstance(flag.kind, tuple) else EXAMPLES[flag.kind]}"


def whole(row: Command) -> list[str]:
    """A command line (program name first) with what the row must have, its form included."""
    argument, required = row.argument, [example(flag) for flag in row.all_flags if flag.required]
    words = [argument.kind[-1] if isinstance(argument.kind, tuple) else "why?"] if argument else []
    form = [row.form] if row.form and not any(text.startswith(row.form) for text in required) else []
    return ["reft", *form, *words, *required]


ROWS = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


@ROWS
def test_help_has_every_flag_with_its_default(capsys, row):
    __main__.run_command([row.command, "--help"])
    text = capsys.readouterr().out
    assert f"python -m reft_jax {row.name} " in text and row.help in text
    assert all(re.search(rf"--{flag.name}\b", text) for flag in row.all_flags)
    alone = " ".join(described([row]).split())
    for flag in row.all_flags:
        default = str(flag.default).lower() if flag.kind is bool else flag.default
        ending = " (required)" if flag.required else f" (default: {default})" if default not in (None, "", []) else ""
        assert re.search(rf"--{flag.name}(=\S+)? {re.escape(flag.help + ending)}( |$)", alone)


def test_help_of_all_has_a_line_for_each_and_the_exit_codes(capsys):
    __main__.run_command([])
    text = capsys.readouterr().out
    for row in TABLE:
        assert re.search(rf"^  {re.escape(row.name)} {{2,}}\S", text, re.M), row.name
    assert all(re.search(rf"\b{code} \w", text) for code in (0, 1, 2, 3, 4, 75)) and "128 +" in text


def test_help_lists_the_settings_of_a_file(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    __main__.run_command(["reft", "--help", QUICKSTART, "--config.rl.kl_coef=0.5"])
    text = capsys.readouterr().out
    assert all(f"--config.{key}=" in text for key in SETTINGS)
    assert "--config.rl.kl_coef=0.5 " in text and "--config.rl.questions=128" in text
    assert "KL penalty β" in text
    assert described(rows_of(TABLE[0])) in described(rows_of(TABLE[0]), default_config())


def test_help_imports_no_jax():
    """So it answers at once. The same holds for a command line that is refused."""
    code = f"""
import sys
from reft_jax import __main__
from reft_jax.types import InputError
for command in {COMMANDS!r}:
    __main__.run_command([command, "--help"])
    try:
        __main__.run_command([command, "--no_such_flag=1"])
    except InputError as error:
        assert "unknown flag" in str(error), error
    else:
        raise SystemExit(f"{{command}} took it")
raise SystemExit(str({{"jax", "jaxlib", "flax", "numpy", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "set()\n"
    asked = subprocess.run(
        [sys.executable, "-m", "reft_jax", "sft", "--help"], cwd=ROOT, capture_output=True, timeout=60
    )
    assert asked.returncode == 0 and asked.stderr == b""


def test_libraries_find_no_pytorch_where_it_is_installed():
    """They would import it at every start."""
    code = """
import sys
from reft_jax import __main__
__main__.run_command = lambda _: print(sys.modules["torch"])
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "None\n", done.stderr


@ROWS
def test_every_flag_is_read_and_arrives(row):
    """One at a time, and all together; the row is the one that was meant."""
    for more in [*([flag] for flag in row.all_flags), row.all_flags]:
        argv = [*whole(row), *(example(flag) for flag in more if not flag.required)]
        found, values, given = __main__.parse(rows_of(row), argv)
        assert found is row
        for flag in more:
            expected = flag.kind[-1] if isinstance(flag.kind, tuple) else VALUES[flag.kind]
            assert flag.value(values) == expected
            assert flag.to is None or flag not in row.flags or given[flag.to or flag.name] == expected


@ROWS
def test_the_function_of_a_row_takes_what_it_is_given(row):
    _, values, given = __main__.parse(rows_of(row), whole(row))
    kinds = next((flag.kind for flag in row.flags if f"{{{flag.name}}}" in row.calls), ("",))
    for kind in kinds:
        module, name = row.calls.format(kind=kind).split(":")
        inspect.signature(getattr(importlib.import_module(module), name)).bind(**dict.fromkeys(row.gets), **given)


@ROWS
def test_flags_are_spelled_alike(row):
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", flag.name) for flag in row.all_flags)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("export --out=x", "--out is now --out_dir"),
        ("export --out x", "--out is now --out_dir"),
        ("convert gsm8k --in=a --out-dir=x", "--out-dir is now --out_dir"),
        ("convert weights --out-dir x", "--out-dir is now --out_dir"),
        ("evaluate --samples=a --out-dir=x", "--out-dir is now --out_dir"),
        ("solve --model=m --engine=nl q", "--engine is now --format"),
        ("sft --config.ppo.kl_coef=0.1", "--config.ppo.kl_coef is now --config.rl.kl_coef"),
        ("reft --config.ppo.prompts=8", "--config.ppo.prompts is now --config.rl.questions"),
        ("check --config.data.engine=nl", "--config.data.engine is now --config.data.format"),
        (f"sft {QUICKSTART} --workdir=w --allow_config_change=seed,ppo.kl_coef", "ppo.kl_coef is now rl.kl_coef"),
        (f"sft {QUICKSTART} --workdir=w --allow_config_change=data.engine", "data.engine is now data.format"),
        ("sft --config.ppo.klcoef=0.1", "unknown flag --config.ppo.klcoef; did you mean --config.rl.kl_coef?"),
        ("solve --max-len=3 q", "--max-len is now --max_len"),
        ("evaluate --samples=a --workdir=w", "--workdir is a flag of `evaluate`, not of `evaluate --samples`; see"),
        ("evaluate --samples=a --config.seed=1", "--config.seed is a flag of `evaluate`, not of `evaluate --samples`"),
        ("evaluate --replay --config=c", "--config is a flag of `evaluate`, not of `evaluate --replay`"),
        ("evaluate --replay", "--workdir is missing; see python -m reft_jax evaluate --help"),
        (
            f"evaluate {QUICKSTART} --workdir=w --execute",
            "--execute is a flag of `evaluate --samples`, not of `evaluate`",
        ),
        ("convert weights --in=a --out_dir=b --show=3", "--show is a flag of `convert`, not of `convert weights`"),
        ("convert weights c --in=a --out_dir=b", "unexpected argument 'c'"),
        ("evaluate --samples= --execute", "--samples is missing; see python -m reft_jax evaluate --help"),
        (f"sft {QUICKSTART} --workdir=w --num_processes=0", "num_processes"),
        ("plan --config=c --topology=v5e:4x8,v5e:2x2", "there is no file c"),
        (f"plan {QUICKSTART} --topology=v5e:4x8,v5e:2x2", "--topology: several pods need --search or --grow"),
        (f"plan {QUICKSTART} --topology=v5e:2x2 --grow=4 --json", "--grow: makes one table of the pods"),
        (f"plan {QUICKSTART}", "--topology is missing; see python -m reft_jax plan --help"),
    ],
)
def test_what_is_refused(monkeypatch, argv, says):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as caught:
        __main__.run_command(argv.split())
    assert says in str(caught.value)


def test_a_command_that_finds_a_fault_ends_with_1(monkeypatch, tmp_path):
    for right in (True, False, np.False_):
        monkeypatch.setattr("reft_jax.commands.check.run_check", lambda folder, config, right=right: right)
        command = ["check", f"--config={ROOT / 'configs' / 'quickstart.py'}", f"--model={tmp_path}"]
        if not right:
            with pytest.raises(SystemExit) as stopped:
                __main__.run_command(command)
            assert stopped.value.code == 1
        else:
            __main__.run_command(command)


def test_the_commands_that_several_hosts_run_together():
    joined = {row.name for row in TABLE if row.on_hosts}
    alone = {"evaluate --replay", "evaluate --samples", "check", "plan", "solve", "convert", "convert weights"}
    alone |= {"convert adapter", "look"}
    assert joined == {row.name for row in TABLE} - alone
    for row in TABLE:
        if row.on_hosts:
            assert all(flag in row.all_flags for flag in (CONFIG, *WORKDIR, *HOSTS))


def test_help_is_no_error(monkeypatch, capsys):
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for argv in ([], ["--help"], ["help"], ["sft", "--help"]):
        monkeypatch.setattr(sys, "argv", ["reft", *argv])
        __main__.main()
        first = "sft" if len(argv) == 2 else "COMMAND"
        assert capsys.readouterr().out.startswith(f"python -m reft_jax {first} [--flag=VALUE …]\n")
