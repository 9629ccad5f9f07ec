"""Every text of the method, and how it becomes the ids that a model reads and back: prompts, forced prefix, targets.

A row of training or rollout is `prompt + target`. With the answer format `python` rollouts continue a forced prefix
(the head of the program with the question as its docstring), so that a model never has to repeat the question.
Supervised training still sees the whole program. With `nl` the target is free text that ends with the answer phrase.

By `data.template`, a prompt is the method's own text, or that text as the user's message in the base model's chat
template. The assistant's message then begins with the forced prefix. Training, rollouts, the reranker and grading all
use one Prompter.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from reft_jax.tasks.registry import PAPER, Task
from reft_jax.tasks.tokenizer import decode, encode, encode_all
from reft_jax.types import Completion, Example, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROGRAM_HEAD = "def solution():\n"
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
QUESTION, ANSWER = "REFT-QUESTION", "REFT-ANSWER"  # stand for the two texts while a template is read
# A prompt may not depend on the day on which a run resumes. Llama 3.1's template has this date.
ONE_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


def prompt_text(question: str, task: Task = PAPER) -> str:
    """The prompt of one question, the same for both answer formats."""
    return f"{task.before}{question.strip()}{task.after}"


def forced_prefix(question: str, answer_format: str, task: Task = PAPER) -> str:
    """The beginning of every rollout's answer: two lines of program for `python`, nothing for `nl`.

    Nothing either if the task wants tests to pass: its programs define what the tests call.
    """
    forced = answer_format == "python" and task.want != "tests"
    return f"{PROGRAM_HEAD}    {docstring(question.strip())}\n" if forced else ""


def docstring(question: str) -> str:
    """The question between triple quotes.

    It is unchanged, as in the paper's code, if a program with it compiles. It does not where the question ends in a
    double quote or a backslash, or holds three quotes or \\u without a number. Then all its backslashes and double
    quotes are escaped.
    """
    plain = f'"""{question}"""'
    if not ("\\" in question or '"""' in question or question.endswith('"')) or is_docstring(plain):
        return plain
    escaped = question.replace("\\", "\\\\").replace('"', '\\"')
    return f'"""{escaped}"""'


def is_docstring(source: str) -> bool:
    """Whether this is the Python source of one string and nothing else."""
    statements = parsed(source)
    return len(statements) == 1 and is_text(statements[0])


def is_text(statement: ast.stmt) -> bool:
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)


def parsed(source: str) -> list[ast.stmt]:
    """The statements of a program; none if it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes like \d, which Python leaves unchanged
        try:
            return ast.parse(source).body
        except UNPARSABLE:
            return []


def rollout_prompt(question: str, answer_format: str, task: Task = PAPER) -> str:
    """What a rollout continues: one string, tokenized once, since sentencepiece splits differently at another cut."""
    return prompt_text(question, task) + forced_prefix(question, answer_format, task)


def sft_target(example: Example, answer_format: str, task: Task = PAPER) -> str:
    """The text after the prompt that supervised training learns, without EOS.

    It is the whole program, or for `nl` the reasoning and then the answer phrase with the answer. Where `docstring`
    escapes the question, the program's docstring is escaped too.

    Raises InputError if the worked solution has the other answer format: such a file trains without complaint, and the
    model then never answers.
    """
    cot = example.answer_cot.strip()
    if task.want == "tests":
        return cot
    is_program = PROGRAM_HEAD.strip() in cot
    if is_program != (answer_format == "python"):
        kind = "a program" if is_program else "not a program"
        raise InputError(
            f"{example.item_id}: answer_cot is {kind}, but the answer format is {answer_format}; use the data file of "
            "that answer format"
        )
    if not is_program:
        task = task.of(example.item_id)
        return f"{cot}\n{task.phrase}{task.plain(example.answer_value)}"
    question = example.question.strip()
    return cot.replace(f'"""{question}"""', docstring(question), 1)


def completion_text(full_text: str, after: str = PAPER.after) -> str:
    """The answer inside the decoded text of prompt and response: what follows the last `after`, stripped."""
    return full_text.rpartition(after)[2].strip()


class Frame(NamedTuple):
    """What stands around question and answer in a row.

    before, after: the texts before and after the question. lead: spaces between `after` and an answer. end: the id
    after an answer. special: finds the special tokens that `before` and `after` spell; None if they spell none.
    """

    before: str
    after: str
    lead: str
    end: int
    special: re.Pattern | None


@dataclass(frozen=True)
class Prompter:
    """Makes rows of questions and answers, and reads answers out of rows.

    read: what `frame.after` is in decoded text. The answer follows its last occurrence. known: the ids of the prompts
    so far, by question: a start needs those of a training question twice, and each rollout again.
    """

    tok: PreTrainedTokenizerFast
    answer_format: str
    task: Task
    frame: Frame
    read: str
    known: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def text(self, question: str, answer: str) -> str:
        """A row as text, with the spelling of its special tokens, without its end."""
        before, after, lead, _, _ = self.frame
        return f"{before}{question.strip()}{after}{lead if answer else ''}{answer}"

    def ids(self, question: str, answer: str = "") -> list[int]:
        """The ids of `text`, tokenized as one string.

        Only the template's own special tokens become their ids. One that a question or an answer spells is text.
        """
        if not (special := self.frame.special):
            return encode(self.tok, self.text(question, answer))
        before, after, lead, _, _ = self.frame
        ids, run = [], before
        for theirs, own in ((question.strip(), after + (lead if answer else "")), (answer, "")):
            for part in special.split(theirs):
                if special.fullmatch(part):
                    ids += encode(self.tok, run, special=True) + encode(self.tok, part)
                    run = ""
                else:
                    run += part
            run += own
        return ids + encode(self.tok, run, special=True)

    def all_ids(self, questions: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
        """`ids` of every question with its answer; of the method's prompt in one call, which is quicker."""
        pairs = zip(questions, answers, strict=True)
        if self.frame.special:
            return [self.ids(question, answer) for question, answer in pairs]
        return encode_all(self.tok, [self.text(question, answer) for question, answer in pairs])

    def prefix(self, question: str) -> str:
        """The forced beginning of an answer; empty if there is none."""
        return forced_prefix(question, self.answer_format, self.task)

    def prompt(self, question: str) -> list[int]:
        """The ids that a rollout continues, the forced prefix included, cut where the training rows have a cut too.

        Many byte-level tokenizers make one id of a newline and the indent after it. Training then never saw the id of
        the prefix's last newline in this place, and the model answers with a second `def solution():`. With such a
        tokenizer the newline is left to the model. Sentencepiece models (CodeLlama) keep it.
        """
        return self.prompts([question])[0].tolist()

    def prompts(self, questions: Sequence[str]) -> list[np.ndarray]:
        """`prompt` of every question, int32[P] each, read-only."""
        new = [question for question in dict.fromkeys(questions) if question not in self.known]
        prefixes = [self.prefix(question) for question in new]
        whole = self.all_ids(new, prefixes)
        begun = self.all_ids(new, [prefix + "    a" for prefix in prefixes]) if any(prefixes) else whole
        for question, prefix, ids, more in zip(new, prefixes, whole, begun, strict=True):
            if more[: len(ids)] != ids:
                ids = self.ids(question, prefix[:-1])
            self.known[question] = np.array(ids, np.int32)
            self.known[question].setflags(write=False)
        return [self.known[question] for question in questions]

    def row(self, question: str, target: str) -> tuple[list[int], int]:
        """A supervised row with its end, and how many of its ids are the prompt.

        The method tokenizes prompt and target separately, as the authors do; a chat row is one string.
        """
        return self.rows([question], [target])[0]

    def rows(self, questions: Sequence[str], targets: Sequence[str]) -> list[tuple[list[int], int]]:
        """`row` of every question with its target."""
        prompts = self.all_ids(questions, [""] * len(questions))
        if self.frame.special:
            rows = self.all_ids(questions, targets)
            prompts = [os.path.commonprefix(pair) for pair in zip(prompts, rows, strict=True)]
        else:
            ends = encode_all(self.tok, targets)
            rows = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
        return [([*ids, self.frame.end], len(prompt)) for prompt, ids in zip(prompts, rows, strict=True)]

    def answer(self, ids: Sequence[int]) -> str:
        """The text of the answer in a row without its end.

        Prompt and response must be decoded together: sentencepiece drops the first line's indent of a response alone.
        """
        return completion_text(decode(self.tok, ids), self.read)

    @property
    def template(self) -> str:
        """A name of the chat template as it is used here: two runs with the same name ask alike."""
        return f"chat {hashlib.sha256(repr((self.text(QUESTION, ANSWER), self.frame.end)).encode()).hexdigest()[:16]}"

    def completed(self, prompt: Sequence[int], completion: Completion) -> str:
        """A completion as text, without the id that ended it: that id may be an ordinary token."""
        return self.answer([*prompt, *(completion.tokens[:-1] if completion.finished else completion.tokens)])


def make_prompter(
    tok: PreTrainedTokenizerFast,
    answer_format: str = "python",
    task: Task = PAPER,
    template: str = "method",
    system: str = "",
) -> Prompter:
    """The Prompter of the settings `data.template` and `data.system`.

    Raises InputError if the tokenizer has no chat template, or if its template cannot hold question, answer or system
    prompt.
    """
    if template == "method":
        frame = Frame(task.before, task.after, "", tok.eos_token_id, None)
        return Prompter(tok, answer_format, task, frame, task.after)
    made = Prompter(tok, answer_format, task, chat_frame(tok, task, system), "")
    read = decode(tok, made.ids(QUESTION)).rpartition(QUESTION)[2]
    return Prompter(tok, answer_format, task, made.frame, read)


def chat_frame(tok: PreTrainedTokenizerFast, task: Task, system: str) -> Frame:
    """The tokenizer's chat template around the method's prompt as the user's message. No reasoning before the answer.

    An empty `system` leaves the system prompt to the template. Raises InputError.
    """
    folder = getattr(tok, "read_from", "the tokenizer")
    if not tok.chat_template:
        raise InputError(
            f"{folder}: has no chat template, which data.template='chat' needs; use a model that has one, as most "
            "instruct models do, or set data.template to 'method'"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{task.before}{QUESTION}{task.after}".strip()})
    messages.append({"role": "assistant", "content": ANSWER})
    try:
        source = tok.get_chat_template()
        source = (ONE_DATE if "strftime_now" in source else "") + source
        rendered = tok.apply_chat_template(messages, tokenize=False, chat_template=source, enable_thinking=False)
    except Exception as error:  # a template can raise anything
        reason, setting = " ".join(str(error).split()), f" with data.system={system!r}" if system else ""
        remedy = "empty data.system, " if system else ""
        raise InputError(
            f"{folder}: the chat template fails{setting} ({reason}); {remedy}correct the template, or set "
            "data.template to 'method'"
        ) from error
    before, _, rest = rendered.partition(QUESTION)
    after, found, end = rest.partition(ANSWER)
    if not found or QUESTION in rest or ANSWER in end:
        raise InputError(
            f"{folder}: the chat template does not write the user's message and then the assistant's, each once; "
            "correct the template, or set data.template to 'method'"
        )
    if system.strip() not in before:
        raise InputError(
            f"{folder}: the chat template leaves out data.system={system!r}; empty it, or correct the template"
        )
    tokens = [token.content for token in tok.added_tokens_decoder.values() if token.special]
    special = re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")
    ended = special.search(end)
    kept = after.rstrip(" ")
    last = tok.convert_tokens_to_ids(ended[0]) if ended else tok.eos_token_id
    return Frame(before, kept, after[len(kept) :], last, special)
