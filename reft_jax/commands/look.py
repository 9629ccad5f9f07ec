"""The command `look`: the page of a work directory, or one question's answers in the terminal."""

from pathlib import Path

from reft_jax.page.build import write_page
from reft_jax.page.text import item_text
from reft_jax.types import InputError


def run_look(workdir: Path, *, text: bool = False, item: str = "", iterations: str = "") -> None:
    """Writes report.html, also while a run works there; with `text`, prints the answers to question `item` instead.

    iterations: A-B, those whose rollouts the page shows; "": as many as fit.
    """
    if text != bool(item):
        raise InputError("--text and --item=ID belong together; without both, look writes report.html")
    if text and iterations:
        raise InputError("--iterations is about report.html, which --text does not write; leave one of them out")
    print(item_text(workdir, item) if text else f"{write_page(workdir, iterations)}: open it in a browser")
