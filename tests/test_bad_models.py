"""Commands on folders that are not a base model end like all bad input: exit code 2, one line, nothing written."""

import json
from pathlib import Path

import pytest
import test_bad_input
from test_bad_input import RUN, SFT, Case, check_line, files

model, run_main, write = test_bad_input.model, test_bad_input.run_main, test_bad_input.write  # its fixtures


def make_classifier(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"lm_head.weight"', b'"score.weight"  '))


def edit_config(**changes):
    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def make_bin(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


NO_POLICY = ("a classifier (score.weight of shape", "give the folder of a language model")
CASES = {
    "wrong type": Case(SFT, ("field 'hidden_size' is \"24\"; allowed: a whole",), damage=edit_config(hidden_size="24")),
    "id": Case(SFT, ("field 'eos_token_id' has -1; allowed: 0 to",), damage=edit_config(eos_token_id=[2, -1])),
    "other family": Case(SFT, ("field 'sliding_window' is 8", "use a Llama"), damage=edit_config(sliding_window=8)),
    "bin": Case(
        "solve --model={tmp}/model q", ("-m reft_jax convert weights --in=", "/model --out_dir"), damage=make_bin
    ),
    "sft of a classifier": Case(SFT, NO_POLICY, damage=make_classifier),
    "solve with one": Case("solve --model={tmp}/model question", NO_POLICY, damage=make_classifier),
    "check of one": Case("check --model={tmp}/model --config={tmp}/config.py", NO_POLICY, damage=make_classifier),
    "sweep over one": Case(f"evaluate {RUN} --models={{tmp}}/model", NO_POLICY, damage=make_classifier),
    "policy as a reranker": Case(
        f"evaluate {RUN} --models={{tmp}}/model+{{tmp}}/model", ("/model: no tensor score.weight; a reranker is",)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_written(write, run_main, tmp_path, name):
    argv = write(CASES[name])
    before = files(tmp_path)
    code, stderr = run_main(argv)
    assert code == 2
    check_line(stderr, CASES[name].says)
    assert files(tmp_path) == before
