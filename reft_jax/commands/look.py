"""The command `look`: the page of a work directory, or one question's answers in the terminal."""

from pathlib import Path

from reft_jax.page.build import write_page
from reft_jax.page.text import item_text
from reft_jax.types import InputError


def run_look(workdir: Path, *, text: bool = False, item: str = "") -> None:
    """Writes report.html, also while a run works there; with `text`, prints the answers to question `item` instead."""
    if text != bool(item):
        raise InputError("--text and --item=ID belong together; without both, look writes report.html")
    print(item_text(workdir, item) if text else f"{write_page(workdir)}: open it in a browser")
