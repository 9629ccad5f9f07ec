"""Bad input ends in seconds: exit code 2, one line that says what is wrong and what to do, and nothing written.

Each kind is tried through `main` in this process, twice (with a new work directory and with a used one). Starting the
executor is made an error there, because it comes before devices, weights and compiling. The main kinds are also run as
commands.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import tiny_model

from reft_jax import __main__, executor
from reft_jax.commands.flags import parse_config
from reft_jax.config import load_config, to_json
from reft_jax.model.hf_write import save_hf
from reft_jax.run.machine import running_executor
from reft_jax.run.workdir import check_workdir, create_workdir
from reft_jax.tasks.tokenizer import train_bpe
from reft_jax.types import InputError

REPO = Path(__file__).resolve().parent.parent
REFT = [sys.executable, "-m", "reft_jax"]
LIMIT_S = 15.0  # processor seconds; about 5 are expected
CONFIG = """
from reft_jax.config import default_config

def get_config():
    config = default_config()
    config.model.path = "{tmp}/model"
    config.data.train = config.data.test = "{tmp}/data.json"
    return config
"""
ROWS = [
    {
        "item_id": f"svamp_{i}",
        "question": f"Ann has {i + 5} apples and eats {i}. How many are left?",
        "answer_value": "5",
        "answer_cot": f"def solution():\n    return {i + 5} - {i}" + (" + 0" * 40 if i < 5 else ""),
    }
    for i in range(20)
]


def rows(**changed) -> str:
    """The data file with fields of row 7 changed; None takes one out."""
    row = {key: value for key, value in (ROWS[7] | changed).items() if value is not None}
    return json.dumps([*ROWS[:7], row, *ROWS[8:]])


def cut_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def rename_tensor(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.form.weight"))


def add_token(model: Path) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 300, "content": "<extra>", "special": False})
    path.write_text(json.dumps(tokenizer))


class Case(NamedTuple):
    """One kind of bad input: a command line ("{tmp}": the folder of the inputs), what its line must say, its inputs."""

    args: str
    says: tuple[str, ...]
    data: str = rows()
    config: str = CONFIG
    damage: Callable[[Path], None] = lambda model: None


RUN = "--config={tmp}/config.py --workdir={tmp}/run"
SFT = f"sft {RUN}"
MAIN = {
    "missing data file": Case(
        f"{SFT} --config.data.train={{tmp}}/no.json", ("/no.json: cannot be read", "check the path")
    ),
    "row without question": Case(
        SFT, ("/data.json: row 7, field 'question': is missing; add it",), rows(question=None)
    ),
    "old key in the file": Case(
        SFT,
        ("/config.py: ppo.kl_coef is now rl.kl_coef",),
        config=CONFIG.replace("    return", "    config.ppo.kl_coef = 1\n    return"),
    ),
    "unknown key": Case(f"{SFT} --config.rl.klcoef=1", ("--config.rl.klcoef; did you mean --config.rl.kl_coef?",)),
    "unknown key in the file": Case(
        SFT,
        ("/config.py: unknown key 'rl.klcoef'; did you mean 'rl.kl_coef'?",),
        config=CONFIG.replace("    return", "    config.rl.klcoef = 1\n    return"),
    ),
    "wrong type": Case(f"{SFT} --config.sft.epochs=abc", ("--config.sft.epochs=abc", "int()", "reft_jax/settings.py")),
    "negative batch": Case(f"{SFT} --config.sft.batch_size=-8", ("sft.batch_size=-8", "must be a whole number > 0")),
    "token beyond the vocabulary": Case(
        SFT, ("/model: the tokenizer has ids up to 300", "is 300; use the"), damage=add_token
    ),
    "truncated weights": Case(
        SFT, ("/model.safetensors: ", "bytes, its header promises", "fetch it again"), damage=cut_weights
    ),
    "missing tensor": Case(
        SFT, ("/model: tensor model.norm.weight is missing", "fetch it again"), damage=rename_tensor
    ),
    "too many rows dropped": Case(
        f"{SFT} --config.sft.max_len=120", ("sft.max_len=120: 5 of 20 rows are longer", "20.0%", "raise sft.max_len")
    ),
    "work directory below a file": Case(
        "sft --config={tmp}/config.py --workdir={tmp}/data.json/a/b", ("--workdir: cannot write to", "choose another")
    ),
    "reft before sft": Case(f"reft {RUN}", ("/run has no model 'warmup'; run",)),
}
CASES = MAIN | {
    "old flag": Case(f"{SFT} --config.ppo.prompts=8", ("--config.ppo.prompts is now --config.rl.questions",)),
    "empty data file": Case(SFT, ("/data.json: is empty; check",), " \n"),
    "broken JSON": Case(SFT, ("/data.json: not JSON at line 2, column 13", "correct it"), '[\n{"item_id": "svamp_1'),
    "no list": Case(SFT, ("/data.json: holds an object, not a list",), "{}"),
    "unknown dataset": Case(SFT, ("row 7, field 'item_id': item_id 'aqua_1'", "gsm8k, svamp"), rows(item_id="aqua_1")),
    "missing dev file": Case(f"{SFT} --config.data.dev={{tmp}}/dev.json", ("/dev.json: cannot be read",)),
    "wrong type in the file": Case(
        SFT,
        ("/config.py: sft.epochs='abc' must be of type int",),
        config=CONFIG.replace("    return", "    config.sft.epochs = 'abc'\n    return"),
    ),
    "batch no multiple": Case(
        f"{SFT} --config.sft.micro_batch=5", ("sft.batch_size=48 must be a multiple of sft.micro",)
    ),
    "prompts no multiple": Case(f"{SFT} --config.rl.questions=40", ("rl.questions=40 must be a multiple of rl.minib",)),
    "prompts too long": Case(f"{SFT} --config.rl.max_prompt=9", ("rl.max_prompt=9: 20 of 20 rows", "raise rl.max_p")),
    "missing config file": Case("sft --config={tmp}/no.py --workdir={tmp}/run", ("there is no file", "/no.py")),
    "config file in a bucket": Case(
        "sft --config=gs://b/c.py:x --workdir={tmp}/run", ("--config: gs://b/c.py:x is in a bucket",)
    ),
    "config file with a syntax error": Case(SFT, ("/config.py: SyntaxError: ", "line 1"), config="def get_config(:\n"),
    "config file without get_config": Case(SFT, ("/config.py: must define get_config()",), config="x = 1\n"),
    "config file that fails": Case(SFT, ("/config.py, line 1: ModuleNotFoundError: ",), config="import no_such_module"),
    "no config": Case("sft --workdir={tmp}/run", ("--config=FILE is missing",)),
    "no workdir": Case("sft --config={tmp}/config.py", ("--workdir is missing; see",)),
    "no model flag": Case(f"rerank {RUN}", ("--model is missing; see",)),
    "no out flag": Case(f"export {RUN} --model=sft", ("--out_dir is missing; see",)),
    "another model flag": Case(f"sample {RUN} --model=best", ("--model=best", "warmup|sft|reft")),
    "no kind of self-training": Case(f"self-train {RUN}", ("--kind is missing; see",)),
    "self-train before sft": Case(f"self-train {RUN} --kind=online", ("/run has no model 'warmup'",)),
    "sweep over a missing folder": Case(f"evaluate {RUN} --models={{tmp}}/no", ("/no: neither a Hugging Face folder",)),
    "sweep with two models of one name": Case(
        f"evaluate {RUN} --models={{tmp}}/model,{{tmp}}/model", ("--models: the names model, model must differ",)
    ),
    "sweep with two rerankers": Case(f"evaluate {RUN} --models=a+b+c", ("'a+b+c' has more than one '+'",)),
    "sweep with missing data": Case(
        f"evaluate {RUN} --models={{tmp}}/model --data={{tmp}}/no.json", ("/no.json: cannot be read",)
    ),
    "sweep without models": Case(
        f"evaluate {RUN} --data={{tmp}}/data.json", ("--data is a flag of `evaluate --models`, not of `evaluate`",)
    ),
    "sweep over truncated weights": Case(
        f"evaluate {RUN} --models={{tmp}}/model", ("its header promises",), damage=cut_weights
    ),
    "no sample files": Case("evaluate --samples={tmp}/model", ("no sample files", "sample first")),
    "missing sample file": Case("evaluate --samples={tmp}/no.jsonl", ("/no.jsonl: cannot be read",)),
    "second sample file in a bucket": Case(
        "evaluate --samples={tmp}/data.json,gs://b/a.jsonl", ("--samples: gs://b/a.jsonl is in a bucket",)
    ),
    "questions as sample file": Case("evaluate --samples={tmp}/data.json", ("record 0, field 'predictions'",)),
    "sample files without commas": Case("evaluate --samples=a.jsonl b.jsonl", ("unexpected argument 'b.jsonl'",)),
    "unknown command": Case("train", ("unknown command 'train'; commands: pipeline, sft, reft",)),
    "unknown flag": Case(f"{SFT} --wokdir=x", ("unknown flag --wokdir; did you mean --workdir?",)),
    "missing model folder": Case(f"{SFT} --config.model.path={{tmp}}/no", ("/no: no such folder; give",)),
    "sample before sft": Case(f"sample {RUN} --model=reft", ("/run has no model 'reft'",)),
    "rerank before sft": Case(f"rerank {RUN} --model=sft", ("/run has no model 'warmup'",)),
    "evaluate before sft": Case(f"evaluate {RUN}", ("/run has no model 'sft'",)),
    "export before sft": Case(f"export {RUN} --model=sft --out_dir={{tmp}}/run/out", ("/run has no model 'sft'",)),
    "solve without a question": Case("solve --model={tmp}/model", ("solve takes one question, in quotes",)),
    "solve with a missing folder": Case("solve --model={tmp}/no question", ("/no: no such folder; give",)),
    "solve with an unknown flag": Case("solve --modle={tmp}/model question", ("--modle; did you mean --model?",)),
    "convert an unknown dataset": Case(
        "convert aqua --out_dir={tmp}/run",
        ("convert takes one dataset of gsm8k, svamp, mathqa, mathqa-numeric, weights",),
    ),
    "convert without a folder": Case("convert gsm8k --in={tmp}/data.json", ("--out_dir is missing",)),
    "convert without a file": Case("convert svamp --out_dir={tmp}/run", ("--in is missing: name the file of svamp",)),
    "convert a missing file": Case(
        "convert gsm8k --in={tmp}/no.jsonl --out_dir={tmp}/run", ("/no.jsonl: cannot be read", "check the path")
    ),
    "convert below a file": Case(
        "convert svamp --in={tmp}/data.json --out_dir={tmp}/data.json/a", ("--out_dir: cannot write to", "another")
    ),
    "convert another dataset's rows": Case(
        "convert mathqa --in={tmp}/data.json --out_dir={tmp}/run",
        ("row 0, field 'item_id': 'svamp_0' is not a row of",),
    ),
    "convert official rows without an answer": Case(
        "convert gsm8k --in={tmp}/data.json --out_dir={tmp}/run",
        ("/data.json: row 1, field 'answer': is missing; add it",),
        json.dumps([{"question": "1 + 1?", "answer": "1+1 = 2\n#### 2"}, {"question": "1 + 2?"}]),
    ),
    "solve with truncated weights": Case("solve --model={tmp}/model q", ("its header promises",), damage=cut_weights),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A Hugging Face folder of a tiny model with 300 tokens."""
    folder = tmp_path_factory.mktemp("bad_input") / "model"
    tokenizer = train_bpe([row["question"] + row["answer_cot"] for row in ROWS], 300)
    save_hf(folder, *tiny_model(vocab_size=300, max_position_embeddings=1024), tokenizer=tokenizer)
    return folder


@pytest.fixture
def write(model, tmp_path):
    """Lays the inputs of a case out in `tmp_path` and returns its command line."""

    def write(case: Case) -> list[str]:
        shutil.copytree(model, tmp_path / "model")
        case.damage(tmp_path / "model")
        (tmp_path / "data.json").write_text(case.data)
        (tmp_path / "config.py").write_text(case.config.replace("{tmp}", str(tmp_path)))
        return [arg.replace("{tmp}", str(tmp_path)) for arg in case.args.split()]

    return write


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a command in this process: its exit code and what it wrote to stderr."""

    def reached(*args):
        raise AssertionError("nothing was found wrong")

    def run_main(argv: list[str]) -> tuple[int, str]:
        monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # main sets it: undone with the test
        monkeypatch.setattr(executor, "start", reached)
        monkeypatch.setattr(sys, "argv", ["reft", *argv])
        with pytest.raises(SystemExit) as stopped:
            __main__.main()
        return stopped.value.code, capsys.readouterr().err

    return run_main


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def use(workdir: Path, argv: list[str]) -> None:
    """Makes `workdir` look as if `argv` had worked in it before, with its settings where they can be parsed."""
    try:
        of_config = [arg for arg in argv if arg.startswith("--config")]
        settings = to_json(parse_config(["reft", *of_config]))
    except InputError:
        settings = "{}"
    for name, text in {
        "config.json": settings,
        "versions.json": "{}",
        "report.md": "| model | top-1 |",
        "sft/done.json": '{"best_epoch": 3}',
        "samples/sft_test.jsonl": '{"item_id": "svamp_1"}\n',
    }.items():
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text(text)


def check_line(stderr: str, says: tuple[str, ...]) -> None:
    assert stderr.startswith("error: ") and stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    assert all(part in stderr for part in says), stderr


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_written(write, run_main, tmp_path, name, used):
    argv = write(CASES[name])
    if used:
        use(tmp_path / "run", argv)
    before = files(tmp_path)
    code, stderr = run_main(argv)
    assert code == 2
    check_line(stderr, CASES[name].says)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", MAIN)
def test_as_a_command(write, tmp_path, name):
    argv = write(MAIN[name])
    before, spent = files(tmp_path), processor_seconds()
    done = subprocess.run([*REFT, *argv], cwd=REPO, capture_output=True, text=True, timeout=120)
    spent = processor_seconds() - spent  # not wall time: a busy machine would fail the test
    assert done.returncode == 2
    check_line(done.stderr, MAIN[name].says)
    assert files(tmp_path) == before
    assert spent < LIMIT_S


@pytest.mark.parametrize("args", [SFT, f"reft {RUN}", f"sample {RUN} --model=sft", f"evaluate {RUN}"])
def test_good_input_passes(write, run_main, tmp_path, args):
    """What every case above differs from in one thing: it reaches the executor, with nothing written yet."""
    argv = write(Case(args, ()))
    for name in ("warmup", "sft"):
        (tmp_path / "run" / "models" / name).mkdir(parents=True)
    before = files(tmp_path)
    with pytest.raises(AssertionError, match="nothing was found wrong"):
        run_main(argv)
    assert files(tmp_path) == before


def test_a_work_directory_of_other_settings(write, run_main, tmp_path):
    argv = write(Case(f"{SFT} --config.seed=7 --config.rl.kl_coef=0.05", ()))
    use(tmp_path / "run", argv[:2])
    before = files(tmp_path)
    code, stderr = run_main(argv)
    assert code == 2
    check_line(
        stderr, ("/run was made with other settings (", "seed: 42 -> 7", "rl.kl_coef: 0.01 -> 0.05", "choose another")
    )
    assert stderr.count("->") == 2
    assert files(tmp_path) == before


def test_named_settings_may_change_and_where_a_run_computes_always(write, run_main, tmp_path):
    changes = "--config.seed=7 --config.rl.kl_coef=0.05 --config.mesh.fsdp=2 --config.executor.workers=1"
    argv = write(Case(f"{SFT} {changes} --allow_config_change=seed", ()))
    use(tmp_path / "run", argv[:2])
    code, stderr = run_main(argv)
    assert code == 2
    check_line(stderr, ("seed: 42 -> 7", "rl.kl_coef: 0.01 -> 0.05", "--allow_config_change=rl.kl_coef"))
    assert "mesh" not in stderr and "workers" not in stderr
    with pytest.raises(AssertionError, match="nothing was found wrong"):
        run_main([*argv[:-1], "--allow_config_change=seed,rl.kl_coef"])
    code, stderr = run_main([*argv[:-1], "--allow_config_change=rl.kl_coeff"])
    assert code == 2
    check_line(stderr, ("--allow_config_change: unknown key 'rl.kl_coeff'", "did you mean 'rl.kl_coef'"))


def test_a_changed_config_takes_the_place_of_the_first(tmp_path):
    config = load_config(str(REPO / "configs" / "quickstart.py"))
    for seed in (7, 8, 8):
        config.seed = seed
        create_workdir(config, tmp_path / "run")
        assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == seed
        check_workdir(config, tmp_path / "run", [])


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null"])
def test_a_work_directory_with_a_broken_record(write, run_main, tmp_path, text):
    argv = write(Case(SFT, ()))
    use(tmp_path / "run", argv)
    (tmp_path / "run" / "config.json").write_text(text)
    code, stderr = run_main(argv)
    assert code == 2
    check_line(stderr, ("/run/config.json: not the settings of a run", "choose another --workdir"))
    assert (tmp_path / "run" / "config.json").read_text() == text


def test_a_read_only_work_directory(write, tmp_path):
    """File modes do not stop root, so root gets a read-only mount in its own namespace."""
    fixed = tmp_path / "fixed"
    fixed.mkdir(mode=0o555)
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"', str(fixed)]
    if not os.access(fixed, os.W_OK):
        mount = []
    elif not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this user may write to read-only folders and not mount one")
    argv = write(Case("sft --config={tmp}/config.py --workdir={tmp}/fixed/a/b", ()))
    done = subprocess.run([*mount, *REFT, *argv], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    check_line(done.stderr, ("--workdir: cannot write to", "/fixed is not a writable folder", "choose another"))


def processor_seconds() -> float:
    """Of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def test_a_machine_without_protection_is_wrong_input_unless_allowed(monkeypatch, capsys):
    def start(workers, memory_mb, allow_unsandboxed):
        if not allow_unsandboxed:
            raise executor.UnprotectedError("set executor.allow_unsandboxed=true")
        return "programs run with: rlimits"

    monkeypatch.setattr(executor, "start", start)
    with pytest.raises(InputError, match="executor.allow_unsandboxed=true"), running_executor(2, 1024, False):
        pass
    with running_executor(2, 1024, True):
        pass
    assert capsys.readouterr().err == "programs run with: rlimits\n"
