"""The method's prompt, and the same in a chat template, compared with transformers' apply_chat_template."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_tokenizer import PROGRAM_TAIL, QUESTION, TEXTS
from tiny import tiny_model

from reft_jax.commands.evaluate import about
from reft_jax.commands.export import prompt_format
from reft_jax.config import check_config, default_config
from reft_jax.model.hf_write import save_hf
from reft_jax.parallel.mesh import make_mesh
from reft_jax.run.inputs import Data, Inputs
from reft_jax.run.machine import make_machine
from reft_jax.run.open import Run, Workdir
from reft_jax.stages.models import Weights
from reft_jax.stages.rerank import scores_made_by
from reft_jax.stages.sample import made_by
from reft_jax.tasks.answerable import unanswerable
from reft_jax.tasks.prompts import forced_prefix, make_prompter, rollout_prompt
from reft_jax.tasks.registry import PAPER
from reft_jax.tasks.tokenizer import encode, load_tokenizer, train_bpe
from reft_jax.types import Completion, Example, InputError

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML = (  # Qwen2.5's, without tools
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{%- for m in messages %}" + TURN + "{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (  # its spaces are stripped, and its system prompt has a date
    "{{ '<|im_start|>system\nToday: ' + (strftime_now('%d %b %Y') if strftime_now is defined else 'none') }}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
)
MISTRAL = (  # a space before an answer, none in the generation prompt; no system prompt
    "{%- for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|> ' + m.content + '<|im_start|>' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '<eos>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PROMPT = rollout_prompt(QUESTION, "python")
USER = PROMPT.partition("\ndef solution")[0]


@pytest.fixture
def folder(tmp_path) -> Path:
    """The tokenizer of an instruct model: <|im_end|> ends a turn, and the tokenizer's own EOS is another token."""
    bpe = train_bpe([*TEXTS, "system user assistant\nYou help."], 400)
    bpe.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    bpe.save_pretrained(tmp_path)
    return with_template(tmp_path, CHATML)


def with_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


def theirs(tok, system: str = "", **how) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": USER}]
    return tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **how)


@pytest.mark.parametrize("system", ["", "Write Python."])
def test_a_prompt_is_that_of_apply_chat_template_and_the_forced_prefix(folder, system):
    tok = load_tokenizer(folder)
    prompter, prefix = make_prompter(tok, "python", PAPER, "chat", system), forced_prefix(QUESTION, "python")
    text = theirs(tok, system) + prefix
    assert text.startswith(f"<|im_start|>system\n{system or 'You help.'}<|im_end|>\n<|im_start|>user\nQuestion:\nAnn")
    whole = tok(text, add_special_tokens=False)["input_ids"]
    assert prompter.ids(QUESTION, prefix) == whole
    cut = tok(text[:-1], add_special_tokens=False)["input_ids"]  # its newline and indent are one id in training
    assert prompter.prompt(QUESTION) == cut != whole
    assert prompter.answer(prompter.prompt(QUESTION)) == prefix.strip()
    row, prompt_len = prompter.row(QUESTION, prefix + PROGRAM_TAIL)
    assert row == tok(text + PROGRAM_TAIL + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert row[:prompt_len] == tok(theirs(tok, system), add_special_tokens=False)["input_ids"]
    assert row[: len(cut)] == cut
    answer = Completion("a", 0, np.array(row[len(cut) :]), None, True)
    assert prompter.completed(cut, answer) == prefix + PROGRAM_TAIL
    assert prompter.ids(QUESTION, prefix + PROGRAM_TAIL) == row[:-1]  # the reranker reads it too
    text_only = make_prompter(tok, "nl", PAPER, "chat", system)
    assert text_only.prompt(QUESTION) == row[:prompt_len] and text_only.answer(row[:prompt_len]) == ""


def test_the_methods_prompt_is_one_string_without_special_tokens(folder):
    tok = load_tokenizer(folder)
    prompter = make_prompter(tok)
    assert prompter.prompt(QUESTION) == encode(tok, PROMPT[:-1])
    row, prompt_len = prompter.row(QUESTION, "x = <|im_end|>1")
    head = encode(tok, USER + "\n")
    assert row == head + encode(tok, "x = <|im_end|>1") + [tok.eos_token_id] and prompt_len == len(head)
    assert prompter.ids(QUESTION, "done") == encode(tok, USER + "\ndone")


def test_other_kinds_of_template(folder):
    llama3 = make_prompter(load_tokenizer(with_template(folder, LLAMA3)), "python", PAPER, "chat")
    assert llama3.frame.before.startswith("<|im_start|>system\nToday: 26 Jul 2024<|im_start|>user\n\nQuestion:\n")
    assert llama3.answer(llama3.prompt(QUESTION)) == forced_prefix(QUESTION, "python").strip()
    tok = load_tokenizer(with_template(folder, MISTRAL))
    mistral, nl = (make_prompter(tok, kind, PAPER, "chat") for kind in ("python", "nl"))
    assert mistral.text("Q", "def") == "<|im_start|> Question:\nQ\nAnswer reasoning:<|im_start|> def"
    assert nl.prompt(QUESTION) == tok(theirs(tok), add_special_tokens=False)["input_ids"]
    assert nl.row(QUESTION, "It is 3.")[0][-1] == tok.eos_token_id
    assert mistral.answer(mistral.prompt(QUESTION)) == forced_prefix(QUESTION, "python").strip()


@pytest.mark.parametrize("how", [("python",), ("nl",), ("python", PAPER, "chat")])
def test_questions_together_have_the_prompts_and_rows_that_each_has_alone(folder, how):
    tok, questions = load_tokenizer(folder), [QUESTION, "Why?", QUESTION, 'He says "3"', "<|im_end|> <eos>", "Why?"]
    together, targets = make_prompter(tok, *how), [f"answer {number}" for number in range(len(questions))]
    for _ in range(2):  # the second time they are known
        for question, found in zip(questions, together.prompts(questions), strict=True):
            ids, prefix = together.ids(question, together.prefix(question)), together.prefix(question)
            if prefix and together.ids(question, prefix + "    a")[: len(ids)] != ids:
                ids = together.ids(question, prefix[:-1])
            assert found.tolist() == ids == make_prompter(tok, *how).prompt(question)
    for question, target, found in zip(questions, targets, together.rows(questions, targets), strict=True):
        prompt, row = together.ids(question), together.ids(question, target)
        if len(how) == 1:
            row = prompt + encode(tok, target)
        else:
            prompt = os.path.commonprefix([prompt, row])
        assert found == ([*row, together.frame.end], len(prompt))


def test_a_special_token_that_a_question_or_an_answer_spells_is_text(folder):
    prompter = make_prompter(load_tokenizer(folder), "python", PAPER, "chat")
    marks = prompter.tok.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<eos>"])
    question = "What does <|im_end|>\n<|im_start|>system mean? <eos>"
    plain, spelled = prompter.prompt("Why?"), prompter.prompt(question)
    assert [spelled.count(mark) for mark in marks] == [plain.count(mark) for mark in marks] == [3, 2, 0]
    assert prompter.answer(spelled) == forced_prefix(question, "python").strip()
    assert prompter.ids("Why?", "a<|im_end|>").count(marks[1]) == 2
    assert unanswerable(prompter, [Example("gsm8k_0", question, "3")], 999) == {}


@pytest.mark.parametrize(
    ("template", "system", "words"),
    [
        (
            "",
            "",
            r"/folder: has no chat template, which data\.template='chat' needs; use .*'method'",
        ),
        (
            MISTRAL,
            "Be kind.",
            r"/folder: the chat template fails with data\.system='Be kind\.' \(Only user .*empty",
        ),
        ("{{ messages[9].content.x }}", "", r"/folder: the chat template fails \(.*\); correct the template, or set"),
        ("{% if %}", "", r"/folder: the chat template fails \(.*\); correct the template, or set data\.template"),
        ("{{ messages[0].content }}", "", r"/folder: the chat template does not write the user's message and then the"),
        (
            CHATML.replace("{%- for m in messages", "{%- for m in messages[-2:]"),
            "Be kind.",
            r"leaves out data\.system=",
        ),
    ],
)
def test_a_template_that_does_not_fit_is_one_line(folder, tmp_path_factory, template, system, words):
    there = tmp_path_factory.mktemp("a") / "folder"
    folder.rename(there)
    with_template(there, template)
    if not template:
        (there / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=words) as caught:
        make_prompter(load_tokenizer(there), "python", PAPER, "chat", system)
    assert "\n" not in str(caught.value)


def inputs(folder: Path, examples=(), **settings) -> Inputs:
    config = default_config()
    config.model.path, config.data.train, config.data.test = str(folder), "a.json", "b.json"
    config.update_from_flattened_dict({"data.template": "chat"} | settings)
    return Inputs(check_config(config), folder, load_tokenizer(folder), Data(list(examples), [], [], ""))


def test_a_system_prompt_needs_a_chat_template(folder):
    with pytest.raises(InputError, match=r'data\.system is set, and only data\.template="chat"'):
        inputs(folder, **{"data.template": "method", "data.system": "Be kind."})


def test_a_row_ends_at_either_end(folder, tmp_path_factory):
    """At the tokenizer's EOS and at the template's end, though config.json names only the former."""
    run, out = inputs(folder), tmp_path_factory.mktemp("out") / "model"
    model, params = tiny_model(vocab_size=len(run.tokenizer))
    save_hf(out, model, params, tokenizer=run.tokenizer)
    run, method = inputs(out), inputs(out, **{"data.template": "method"})
    mesh, eos, end = make_mesh(1, 1, 1), run.tokenizer.eos_token_id, run.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [make_machine(one.config, out, one.end_ids, mesh, None).engine.eos_ids for one in (run, method)]
    assert ends == [tuple(sorted([eos, end])), (eos,)]


def test_records_name_the_template_and_the_methods_are_as_before(folder):
    method, chat = inputs(folder, **{"data.template": "method"}), inputs(folder)
    kind = inputs(folder, **{"data.system": "Be kind."})
    assert method.template == "" and chat.template.startswith("chat ") and chat.template != kind.template
    for key in ("train", "dev"):
        assert method.data_made[key] == chat.data_made[key].partition("chat ")[0] != chat.data_made[key]
    settings = [one.data_made["settings"] for one in (method, chat, kind)]
    assert len(set(settings)) == 3
    assert method.made_by()["data"] == method.data.checksum() != chat.made_by()["data"]
    runs = [Run(one, None, Workdir(folder, None), None) for one in (method, chat, kind)]
    headers = [made_by(run, Weights("0", None), [], 1).identity for run in runs]
    assert [header.pop("template", None) for header in headers] == [None, chat.template, kind.template]
    assert headers[0] == headers[1] == headers[2]
    scores = [scores_made_by(run, Weights("0", None), []).identity for run in runs]
    assert [score.get("template") for score in scores] == [None, chat.template, kind.template]
    told = "in the model's chat template"
    assert [about(run).get("prompt") for run in runs] == [None, told, f"{told}, system prompt 'Be kind.'"]


def test_an_export_keeps_the_template_and_ends_at_its_end(folder, tmp_path_factory):
    run = inputs(folder)
    model, params = tiny_model(vocab_size=len(run.tokenizer))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": run.tokenizer.eos_token_id}))
    out = tmp_path_factory.mktemp("out") / "model"
    save_hf(out, model, params, tokenizer=run.tokenizer, end_id=run.prompter.frame.end)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    ends = [run.tokenizer.eos_token_id, run.prompter.frame.end]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == ends
    again = make_prompter(load_tokenizer(out), "python", PAPER, "chat")
    assert again.prompt(QUESTION) == run.prompter.prompt(QUESTION)
    card = prompt_format(run.prompter, PAPER, is_reranker=False)
    assert "<|im_start|>assistant\ndef solution():\n" in card and "with the chat template's special tokens" in card
