"""Every prompt string of the method, once.

A row of training or rollout is `prompt + target`. Under the `python` engine rollouts continue a forced prefix (the
head of the program with the question as its docstring), so that a model never has to repeat the question; supervised
training still sees the whole program. Under `nl` the target is free text that ends with the answer phrase.
"""

import ast
import re
import warnings

from reft_jax.types import Example, InputError

QUESTION = "Question:\n"
REASONING = "\nAnswer reasoning:\n"
ANSWER_PHRASE = "Therefore, the answer is: "
PROGRAM_HEAD = "def solution():\n"
THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?")
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def prompt_text(question: str) -> str:
    """The prompt of one question, the same for every dataset and engine."""
    return f"{QUESTION}{question.strip()}{REASONING}"


def forced_prefix(question: str, engine: str) -> str:
    """What every rollout's answer begins with: two lines of program for `python`, nothing for `nl`."""
    return f"{PROGRAM_HEAD}    {docstring(question.strip())}\n" if engine == "python" else ""


def docstring(question: str) -> str:
    """The question between triple quotes.

    It stands there as it is, as in the paper's code, unless no program would compile then (it ends in a double quote
    or a backslash, holds three quotes or \\u without a number): its backslashes and double quotes are escaped then.
    """
    plain = f'"""{question}"""'
    if not ("\\" in question or '"""' in question or question.endswith('"')) or is_docstring(plain):
        return plain
    escaped = question.replace("\\", "\\\\").replace('"', '\\"')
    return f'"""{escaped}"""'


def is_docstring(source: str) -> bool:
    """Whether this is Python source of one string and nothing else."""
    statements = parsed(source)
    return len(statements) == 1 and is_text(statements[0])


def is_text(statement: ast.stmt) -> bool:
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)


def parsed(source: str) -> list[ast.stmt]:
    """The statements of a program; none if it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes like \d, which stay as they are
        try:
            return ast.parse(source).body
        except UNPARSABLE:
            return []


def plain_answer(answer_value: str) -> str:
    """The answer as it is taught and read: stripped, without the commas between groups of thousands ("1,080")."""
    answer = answer_value.strip()
    return answer.replace(",", "") if "," in answer and THOUSANDS.fullmatch(answer) else answer


def rollout_prompt(question: str, engine: str) -> str:
    """What a rollout continues. One string, to be tokenized once: sentencepiece splits differently at another cut."""
    return prompt_text(question) + forced_prefix(question, engine)


def sft_target(example: Example, engine: str) -> str:
    """The text after the prompt that supervised training learns, without EOS: the whole program, or `nl`'s reasoning
    closed by the answer phrase. A docstring that `docstring` escapes is escaped in it too.

    Raises InputError if the worked solution is of the other engine's kind: such a file trains without complaint and
    yields a model that never answers.
    """
    cot = example.answer_cot.strip()
    is_program = PROGRAM_HEAD.strip() in cot
    if is_program != (engine == "python"):
        kind = "a program" if is_program else "not a program"
        raise InputError(
            f"{example.item_id}: answer_cot is {kind}, but the engine is {engine}; use the data file of that engine"
        )
    if not is_program:
        return f"{cot}\n{ANSWER_PHRASE}{plain_answer(example.answer_value)}"
    question = example.question.strip()
    return cot.replace(f'"""{question}"""', docstring(question), 1)


def completion_text(full_text: str) -> str:
    """The answer inside the decoded text of prompt and response: what follows the last reasoning line, stripped.

    Prompt and response must be decoded together: sentencepiece drops the first line's indent of a response on its own.
    """
    return full_text.rpartition(REASONING)[2].strip()


def rerank_text(question: str, completion: str) -> str:
    """What the reranker reads: the prompt and one completion (a `completion_text`), without EOS."""
    return prompt_text(question) + completion
