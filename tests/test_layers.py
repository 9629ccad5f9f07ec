"""The layers of the package: imports go down only, and parts of one level do not know each other.

The imports are read from the source, those inside functions too; nothing is imported. Not covered: a module named at
run time (`importlib.import_module`).
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "reft_jax"

# A part is a folder or a single module right under reft_jax/; the package itself is "__init__".
LEVELS = {
    "__init__": 0,
    **dict.fromkeys(
        ["types", "settings", "config", "store", "bucket", "appends", "plugins", "terminal", "model_folder"], 1
    ),
    **dict.fromkeys(["algo", "executor", "gsm8k_programs"], 2),
    **dict.fromkeys(["model", "parallel", "tasks"], 3),
    **dict.fromkeys(["train", "engine", "evaluation", "toy"], 4),
    **dict.fromkeys(["run", "conformance"], 5),
    **dict.fromkeys(["stages", "plan", "page"], 6),
    "commands": 7,
    "__main__": 8,
}
# The vocabulary of the package; they raise its errors.
SIDEWAYS = {
    ("config", "types"),
    ("config", "settings"),
    ("store", "types"),
    ("store", "bucket"),
    ("bucket", "appends"),
    ("model_folder", "store"),
    ("plugins", "types"),
    ("model_folder", "types"),
    ("terminal", "store"),
}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
# Rooms that may not import JAX. The executor's workers start before JAX does; the others are text and numbers only.
WITHOUT_JAX = {"types", "executor", "tasks", "evaluation", "gsm8k_programs"}
BANNED = {part: {"torch"} | (JAX if part in WITHOUT_JAX else set()) for part in LEVELS}
# Rooms that could be packages of their own: all they may import of ours.
STANDS_ALONE = {"executor": [], "gsm8k_programs": ["types"]}


def imported_modules(tree: ast.Module, folder: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module of the package `folder`; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def import_problem(part: str, module: str, package: Path) -> str | None:
    """Why `part` may not import `module`, or None if it may."""
    top, _, rest = module.partition(".")
    if top != package.name:
        return f"{part} may not import {top}" if top in BANNED[part] else None
    target = rest.split(".")[0]
    if target not in LEVELS:  # `import reft_jax`, or a name that reft_jax/__init__.py defines
        target = "__init__"
    if target == part or (part, target) in SIDEWAYS:
        return None
    if part in STANDS_ALONE and target not in STANDS_ALONE[part]:
        return f"{part} may not import {target} (of ours: {', '.join(STANDS_ALONE[part]) or 'nothing'})"
    if LEVELS[target] > LEVELS[part]:
        return f"{part} (level {LEVELS[part]}) imports up: {target} (level {LEVELS[target]})"
    if LEVELS[target] == LEVELS[part]:
        return f"{part} imports sideways: {target} (both level {LEVELS[part]})"
    return None


def problems(package: Path) -> list[str]:
    """One line for every broken rule under `package`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        part = name.parts[0].removesuffix(".py")
        if part not in LEVELS:
            found.append(f"{name}: {part} has no level")
            continue
        if "utils" in (*name.parts[:-1], path.stem):
            found.append(f"{name}: a module named utils says nothing about what is in it")
        tree = ast.parse(path.read_text(), filename=path)
        if ast.get_docstring(tree) is None and not (path.name == "__init__.py" and not tree.body):
            found.append(f"{name}: no module docstring")
        for line, module in imported_modules(tree, [package.name, *name.parts[:-1]]):
            if problem := import_problem(part, module, package):
                found.append(f"{name}:{line}: {problem}")
    return found


def test_imports_go_down_only():
    assert (PACKAGE / "types.py").is_file()  # an empty tree would pass
    assert problems(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        (
            "model/llama.py",
            "from reft_jax.stages import sft",
            "llama.py:2: model (level 3) imports up: stages (level 6)",
        ),
        (
            "model/llama.py",
            "def f():\n    import reft_jax.train.step",
            "llama.py:3: model (level 3) imports up: train",
        ),
        ("model/llama.py", "from reft_jax import engine", "imports up: engine (level 4)"),
        ("model/llama.py", "from ..engine.generate import x", "imports up: engine (level 4)"),
        ("types.py", "from . import algo", "types (level 1) imports up: algo"),
        ("__init__.py", "from reft_jax import types", "__init__ (level 0) imports up: types"),
        ("train/loop.py", "from reft_jax.engine.generate import x", "train imports sideways: engine (both level 4)"),
        ("algo/losses.py", "from ..model import llama", "algo (level 2) imports up: model"),
        ("stages/reft.py", "from ..plan import plan", "stages imports sideways: plan"),
        ("types.py", "from reft_jax import config", "types imports sideways: config"),
        (
            "executor/pool.py",
            "from reft_jax.types import InputError",
            "executor may not import types (of ours: nothing)",
        ),
        ("executor/pool.py", "import reft_jax", "executor may not import __init__ (of ours: nothing)"),
        ("gsm8k_programs/words.py", "from reft_jax.store import writing", "may not import store (of ours: types)"),
        ("tasks/answers.py", "import jax.numpy as jnp", "tasks may not import jax"),
        (
            "evaluation/voting.py",
            "def f():\n    from orbax import checkpoint",
            "voting.py:3: evaluation may not import orbax",
        ),
        ("model/hf.py", "import torch", "model may not import torch"),
        ("model/utils.py", "", "model/utils.py: a module named utils"),
        ("misc/thing.py", "", "misc/thing.py: misc has no level"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line, problem):
    package = tmp_path / "reft_jax"
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text(f'"""A module."""\n{line}\n')
    (found,) = problems(package)
    assert problem in found


def test_a_missing_docstring_is_found(tmp_path):
    package = tmp_path / "reft_jax"
    (package / "model").mkdir(parents=True)
    (package / "model" / "__init__.py").write_text("\n")
    (package / "model" / "llama.py").write_text("import jax\n")
    assert problems(package) == ["model/llama.py: no module docstring"]


def test_what_is_allowed(tmp_path):
    """Down, within one part, out of the package, and the package's own names."""
    package = tmp_path / "reft_jax"
    sources = {
        "config.py": "from reft_jax.types import InputError",
        "tasks/answers.py": "import re\nfrom reft_jax.executor import run_programs\nfrom .prompts import prompt_text",
        "train/step.py": "import jax\nfrom reft_jax.algo import losses\nfrom ..model.llama import Llama",
        "stages/sft.py": "import reft_jax\nfrom reft_jax import __version__\nfrom reft_jax.train import step",
        "__main__.py": "from reft_jax.stages import sft",
    }
    for name, source in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(f'"""A module."""\n{source}\n')
    assert problems(package) == []


def test_few_files_tell_a_bucket_from_a_disk():
    asks = [path for path in PACKAGE.rglob("*.py") if re.search(r'is_remote\(|"gs://', path.read_text())]
    known = "store.py bucket.py commands/flags.py model_folder.py model/safetensors.py parallel/host_log.py"
    assert {path.relative_to(PACKAGE).as_posix() for path in asks} == set(known.split())


def test_no_file_has_more_than_400_lines():
    folders = [PACKAGE.parent / name for name in ("reft_jax", "tests", "benchmarks", "configs", "examples")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert (
        len(files) > 100
        and [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []
    )
