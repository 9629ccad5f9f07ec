"""What the documents promise: the README's lines of Python run, and every file that a document names exists."""

import re
from pathlib import Path

import pytest
from tiny import tiny_model

from reft_jax.model.hf_write import save_hf
from reft_jax.tasks.tokenizer import train_bpe

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text()
DOCUMENTS = [*sorted(REPO.glob("*.md")), *sorted(REPO.glob("docs/**/*.md")), REPO / "benchmarks" / "README.md"]


def test_the_ten_lines_give_logits(tmp_path):
    pytest.importorskip("transformers")
    tokenizer = train_bpe(["def solution():\n    return 12"], 300)
    model, params = tiny_model(vocab_size=300)
    save_hf(tmp_path / "model", model, params, tokenizer=tokenizer)
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code.replace("path/to/CodeLlama-7b-hf", str(tmp_path / "model")), names)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert names["logits"].shape == (1, len(tokenizer("def solution():").input_ids), 300)
    assert names["logits"].dtype == "float32"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_every_file_it_links_is_there(document):
    text = document.read_text()
    links = re.findall(r"\]\(((?!http)[^)#]+)", text)
    assert document.name != "README.md" or len(links) >= 4
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_every_section_it_links_is_there(document):
    links = re.findall(r"\]\(((?!http)[^)#]*)#([^)]+)\)", document.read_text())
    missing = [f"{file}#{section}" for file, section in links if section not in sections(document.parent / file)]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_every_module_and_script_it_names_is_there(document):
    assert "\n".join(missing_files(document.read_text())) == ""


def test_a_planted_file_is_missing():
    text = (
        "`tests/test_readme.py`, `types.py`, `model/llama.py`, `model/nobody.py: f`, `launch/test.sh --long`, `a/b.sh`"
    )
    assert missing_files(text) == ["a/b.sh", "model/nobody.py"]


def missing_files(text: str) -> list[str]:
    """Files that a text names in backquotes with a folder: `tests/test_hf.py`, or `plan/hlo.py` below reft_jax/."""
    named = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|yaml))[`: ]", text))
    return sorted(name for name in named if not any((root / name).exists() for root in (REPO, REPO / "reft_jax")))


def sections(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
