"""Every command in the README works exactly as written."""

import re
from pathlib import Path

import pytest
from tiny import tiny_model

from reft_jax.model.hf_write import save_hf
from reft_jax.tasks.tokenizer import train_bpe

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


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


def test_every_file_it_links_is_there():
    root = Path(__file__).resolve().parents[1]
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) >= 4
    assert [link for link in links if not (root / link).exists()] == []
