"""What a question asks for: its prompt, the program to run, how an answer is read, compared and rewarded.

The setting `task` chooses the task of a run:

- "": each item's id names its task, before the first underscore.
- a name in TASKS: that task for every item.
- `path.py:NAME`: the Task called NAME in the file path.py, for every item.

The setting `data.reading` chooses how a task reads what a completion gives: `strict`, the paper's way, or `lenient`.

The default reward is ReFT's (arXiv 2401.08967, eq. 3). Unlike in the paper's released code, these are no answer: NaN,
infinity, and what a MathQA program returns if it is not a letter.
"""

import math
import re
from dataclasses import dataclass, replace

from reft_jax import plugins
from reft_jax.config import nearest
from reft_jax.executor import ExecResult
from reft_jax.tasks import readings
from reft_jax.types import Example, InputError, Verdict

TOLERANCE = 1e-2
THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?")
Value = float | str | None
Answer = tuple[Value, str]  # value and status


@dataclass(frozen=True)
class Task:
    """A task whose answers are numbers. Subclass it and override what differs.

    A value is a finite float, or text in one canonical form: votes compare values exactly, and files keep them as JSON.
    None is no answer.

    Args:
        name: for messages.
        before, after: the texts around the question in a prompt. `after` may not be blank: the completion starts after
            it.
        phrase: what a solution in words ends with, before the answer.
        want: what a program must return: "number" or "text", as in the executor; or "tests": the completion is a whole
            program that begins where it likes, `program` adds tests to it, and the number is the share that holds.
        allowed: what counts as an answer, in words for the message about a wrong `answer_value`.
        other: the status of a program that returned something else than an answer.
        reading: "strict" or "lenient", the setting `data.reading`.
    """

    name: str
    before: str = "Question:\n"
    after: str = "\nAnswer reasoning:\n"
    phrase: str = "Therefore, the answer is: "
    want: str = "number"
    allowed: str = "a finite number"
    other: str = "not_a_number"
    reading: str = "strict"

    @property
    def returns(self) -> str:
        """What the executor must make of a program's value; the lenient reading reads its text."""
        return "text" if self.want == "text" or (self.want == "number" and self.reading == "lenient") else "number"

    def of(self, item_id: str) -> "Task":
        """The task of one item. InputError if the id names none."""
        return self

    def plain(self, answer_value: str) -> str:
        """The correct answer in the form that training targets and `read` use."""
        return plain_answer(answer_value)

    def program(self, completion: str, example: Example) -> str:
        """The program to run for a completion, if the answer format is `python`."""
        return completion

    def read(self, raw: float | str) -> Value:
        """The answer that a program returned or a text stated, read strictly; None if it is no answer."""
        try:
            number = float(raw)
        except ValueError:
            return None
        return number if math.isfinite(number) else None

    def read_lenient(self, raw: float | str) -> Value:
        """The answer that a careful person reads; None if there is none, or if it can be read in two ways."""
        return readings.number(raw)

    def same(self, value: float | str, target: float | str) -> bool:
        """Whether two answers, both from `read`, are the same: numbers within 0.01, text when equal."""
        return value == target if isinstance(value, str) else abs(value - target) <= TOLERANCE

    def reward(self, value: Value, correct: bool, example: Example) -> float:
        """1 for the correct answer, 0.1 for an answer that is wrong, 0 for no answer.

        Use only `item_id` and `answer_value` of the example. The audit log keeps only these, and `evaluate --replay`
        computes the rewards again from it.
        """
        return 1.0 if correct else 0.0 if value is None else 0.1

    def target(self, answer_value: str) -> Value:
        """The correct answer as `read` gives it, None if it is no answer of this task."""
        return self.read(self.plain(answer_value))

    def is_correct(self, value: Value, answer_value: str) -> bool:
        """Whether a value that `read` gave is the correct answer."""
        target = self.target(answer_value)
        return value is not None and target is not None and self.same(value, target)

    def returned(self, result: ExecResult) -> Answer:
        """The answer of a program that was run, with the executor's status or `other`."""
        if result.value is None:
            return None, result.status
        value = self._read(result.value)
        return value, self.other if value is None else result.status

    def stated(self, text: str) -> Answer:
        """The answer that a text states after the last `phrase`: status "ok" or "no_answer".

        The lenient reading also takes what stands in the last \\boxed{} or after the last ####.
        """
        lenient = self.reading == "lenient"
        _, phrase, said = readings.after(text, self.phrase) if lenient else text.rpartition(self.phrase)
        value = self._read(said) if phrase else None
        return value, "no_answer" if value is None else "ok"

    def _read(self, raw: float | str) -> Value:
        lenient = self.reading == "lenient" and self.want != "tests"
        return self.read_lenient(raw) if lenient else self.read(raw)

    def judge(self, value: Value, status: str, example: Example) -> Verdict:
        """The verdict on an answer that `read` gave."""
        correct = self.is_correct(value, example.answer_value)
        return Verdict(value, correct, self.reward(value, correct, example), status)


@dataclass(frozen=True)
class Choice(Task):
    """One of the letters a to e. Upper case, quotes and whitespace are accepted."""

    want: str = "text"
    allowed: str = "one letter a-e"
    other: str = "not_a_letter"

    def read(self, raw: float | str) -> Value:
        letter = re.sub(r"[\s'\"]", "", str(raw)).lower()
        return letter if letter in tuple("abcde") else None

    def read_lenient(self, raw: float | str) -> Value:
        return readings.letter(raw)


class ByPrefix(Task):
    """The task that each item's id names. All of them have the same prompts, so prompts need no id."""

    def of(self, item_id: str) -> Task:
        name = item_id.partition("_")[0]
        if name not in TASKS:
            raise InputError(
                f"item_id {item_id!r} names no known dataset; start it with one of {', '.join(TASKS)} and '_', or set "
                "`task`"
            )
        return TASKS[name] if self.reading == "strict" else replace(TASKS[name], reading=self.reading)


def plain_answer(answer_value: str) -> str:
    """The answer, stripped, without the commas between groups of thousands ("1,080").

    With any other comma ("1,5") it stays as it is, and is no number.
    """
    answer = answer_value.strip()
    return answer.replace(",", "") if "," in answer and THOUSANDS.fullmatch(answer) else answer


TASKS = {name: Task(name) for name in ("gsm8k", "svamp")}
TASKS |= {"mathqa": Choice("mathqa"), "mathqa-numeric": Task("mathqa-numeric"), "toy": Task("toy")}
PAPER = ByPrefix("")  # the paper's files


def load_task(setting: str, reading: str = "strict") -> Task:
    """The task that the settings `task` and `data.reading` name. InputError if there is none."""
    task = _named(setting)
    if reading == "strict":
        return task
    kind = type(task)
    if kind.read is not Task.read and kind.read_lenient is Task.read_lenient and task.want != "tests":
        raise InputError(
            f"data.reading={reading!r}: task={setting!r} reads answers in its own way and has no lenient one; give it "
            "a method read_lenient, or choose strict"
        )
    return replace(task, reading=reading)


def _named(setting: str) -> Task:
    if not setting:
        return PAPER
    if setting in TASKS:
        return TASKS[setting]
    if not plugins.is_plugin(setting):
        raise InputError(
            f"task={setting!r} is not known; did you mean {nearest(setting, TASKS)!r}? Known are {', '.join(TASKS)}, "
            f"and {plugins.FORM} of a file of your own"
        )
    task = plugins.load(setting, "task")
    if not isinstance(task, Task):
        raise InputError(f"task={setting!r} is not a Task; make it an instance of a subclass of tasks.registry.Task")
    if task.want not in ("number", "text", "tests") or not task.after.strip():
        raise InputError(f"task={setting!r}: `want` must be 'number', 'text' or 'tests', and `after` may not be blank")
    return task
