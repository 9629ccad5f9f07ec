"""Every prompt string of the method, once.

A row of training or rollout is `prompt + target`. Under the `python` engine rollouts continue a forced prefix (the
head of the program with the question as its docstring), so that a model never has to repeat the question; supervised
training still sees the whole program. Under `nl` the target is free text that ends with the answer phrase.
"""

from reft_jax.types import Example, InputError

QUESTION = "Question:\n"
REASONING = "\nAnswer reasoning:\n"
ANSWER_PHRASE = "Therefore, the answer is: "
PROGRAM_HEAD = "def solution():\n"


def prompt_text(question: str) -> str:
    """The prompt of one question, the same for every dataset and engine."""
    return f"{QUESTION}{question.strip()}{REASONING}"


def forced_prefix(question: str, engine: str) -> str:
    """What every rollout's answer begins with: two lines of program for `python`, nothing for `nl`.

    As in the paper's code the question is not escaped; one that ends in a double quote makes an invalid program.
    """
    return f'{PROGRAM_HEAD}    """{question.strip()}"""\n' if engine == "python" else ""


def rollout_prompt(question: str, engine: str) -> str:
    """What a rollout continues. One string, to be tokenized once: sentencepiece splits differently at another cut."""
    return prompt_text(question) + forced_prefix(question, engine)


def sft_target(example: Example, engine: str) -> str:
    """The text after the prompt that supervised training learns, without EOS: the whole program, or `nl`'s reasoning
    closed by the answer phrase.

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
    return cot if is_program else f"{cot}\n{ANSWER_PHRASE}{example.answer_value.strip()}"


def completion_text(full_text: str) -> str:
    """The answer inside the decoded text of prompt and response: what follows the last reasoning line, stripped.

    Prompt and response must be decoded together: sentencepiece drops the first line's indent of a response on its own.
    """
    return full_text.rpartition(REASONING)[2].strip()


def rerank_text(question: str, completion: str) -> str:
    """What the reranker reads: the prompt and one completion (a `completion_text`), without EOS."""
    return prompt_text(question) + completion
