"""Every text of the method: prompts, the prefix that rollouts continue, and what supervised training learns.

A row of training or rollout is `prompt + target`. With the answer format `python` rollouts continue a forced prefix
(the head of the program with the question as its docstring), so that a model never has to repeat the question.
Supervised training still sees the whole program. With `nl` the target is free text that ends with the answer phrase.
"""

import ast
import warnings

from reft_jax.tasks.registry import PAPER, Task
from reft_jax.types import Example, InputError

PROGRAM_HEAD = "def solution():\n"
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


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
