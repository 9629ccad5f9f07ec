"""Numbers written as LaTeX or as an expression, for data.format=nl: \\boxed{\\frac{3}{4}}, $2\\sqrt{3}$, 18.

    python -m reft_jax pipeline --config=… --workdir=… --config.task=examples/latex_answers.py:LATEX_ANSWERS

It needs math-verify (`launch/venv.sh math`), which reads LaTeX with ANTLR into SymPy.
"""

import math
from dataclasses import dataclass

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from sympy import Eq

from reft_jax.tasks.registry import Task

HOW = (LatexExtractionConfig(), ExprExtractionConfig())
SECONDS = 2  # per answer; 9^{9^{9}} has no end


@dataclass(frozen=True)
class LatexAnswers(Task):
    allowed: str = "a number or an expression of numbers"

    def plain(self, answer_value):
        return answer_value.strip()

    def read(self, raw):
        found = parse(str(raw), HOW, parsing_timeout=SECONDS)
        value = found[0].rhs if found and isinstance(found[0], Eq) else next(iter(found), None)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None


LATEX_ANSWERS = LatexAnswers("latex")
