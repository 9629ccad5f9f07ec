"""Builds the documentation site: the repository's Markdown as it is, and reference pages made from the code.

    launch/docs.sh       makes site/; open site/index.html

The pages keep their folders, so a link works here and on the site. What they link besides pages (a config, a test) is
copied. The build is strict: it fails if a link leads nowhere. Nothing is loaded from a network, at build or view time.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from reft_jax.commands.table import COMMANDS, TABLE, described, overview
from reft_jax.settings import Config, Setting

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "reft_jax"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
LINK = re.compile(r"\]\(((?!http|#)[^)#]+)")
# Zensical asks a server for this script on every page. It lets search work in a page that is opened as a file.
SHIM, OURS = "https://unpkg.com/iframe-worker/shim", "assets/javascripts/file_worker.js"


def main() -> None:
    build(ROOT)


def build(out: Path) -> None:
    """Makes out/site, by way of out/build/site. CalledProcessError if a page is not as it should be."""
    staged = out / "build" / "site"
    shutil.rmtree(staged, ignore_errors=True)
    stage(staged)
    if out != ROOT:
        shutil.copy(ROOT / "zensical.toml", out)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # mkdocstrings reads the code; it imports none
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    subprocess.run(command, cwd=out, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=True)
    for page in (out / "site").rglob("*.html"):
        ours = os.path.relpath(out / "site" / OURS, page.parent)
        page.write_text(page.read_text().replace(SHIM, ours))
    shutil.copy(ROOT / "docs" / "file_worker.js", out / "site" / OURS)


def stage(folder: Path) -> None:
    """Writes everything that the site is made of."""
    for page in [*(ROOT / name for name in PAGES), *sorted((ROOT / "docs").rglob("*.md"))]:
        linked = [page.parent / link for link in LINK.findall(page.read_text())]
        for path in [page, *(one.resolve() for one in linked if one.suffix != ".md" and one.is_file())]:
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    shutil.copy(ROOT / "docs" / "site.css", folder / "docs")
    reference = folder / "reference"
    reference.mkdir()
    for name, text in {"settings": settings(), "commands": commands(), **modules()}.items():
        (reference / f"{name}.md").write_text(text)


def settings() -> str:
    """Every setting: name, default, what is allowed and what it means."""
    parts = [
        "# Settings\n\nWhat can be set, in a config file (`config.rl.kl_coef = 0.05`) and on the command line "
        "(`--config.rl.kl_coef=0.05`)? This page is made from `reft_jax/settings.py`. The defaults are the paper's."
    ]
    sections = {"": Config} | {f"{one.name}.": one.type for one in fields(Config) if not one.metadata}
    for prefix, section in sections.items():
        rows = {prefix + one.name: one.metadata["setting"] for one in fields(section) if one.metadata}
        title = f"`{prefix.rstrip('.')}`" if prefix else "Of the whole run"
        lines = [f"| `{name}` | {shown(one)} | {one.rule.allowed} | {one.doc} |" for name, one in rows.items()]
        head = "| setting | default | allowed | meaning |\n|---|---|---|---|"
        parts.append("\n".join([f"## {title}\n\n{section.__doc__}\n", head, *lines]))
    return "\n\n".join(parts) + "\n"


def shown(one: Setting) -> str:
    return f"`{one.default}`" if one.default != "" else ""


def commands() -> str:
    """What `--help` prints, of all commands and of each."""
    parts = [f"# Commands\n\nWhat does each command do, and which flags has it?\n\n```\n{overview()}\n```"]
    for name in COMMANDS:
        rows = [row for row in TABLE if row.command == name]
        parts.append(f"## {name}\n\n```\n{described(rows)}\n```")
    return "\n\n".join(parts) + "\n"


def modules() -> dict[str, str]:
    """A page per folder of the package, from its docstrings; one for the modules outside of folders."""
    pages = {"top": ("The modules that every other may import", sorted(PACKAGE.glob("[!_]*.py")))}
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        page = "commands_room" if folder.name == "commands" else folder.name
        pages[page] = (folder.name, [folder / "__init__.py", *sorted(folder.glob("[!_]*.py"))])
    return {name: f"# {title}\n\n" + "\n\n".join(map(module, files)) + "\n" for name, (title, files) in pages.items()}


def module(path: Path) -> str:
    """The line that mkdocstrings replaces with the docstrings of a module; "" if the module is empty."""
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"::: {dotted}" if path.stat().st_size else ""


if __name__ == "__main__":
    main()
