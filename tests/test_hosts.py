"""Two processes over loopback with four CPU devices each do the same as one process with eight, and end together.

Run as a script, this file is one of two hosts that only exchange messages.
"""

import errno
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax.linen import unbox
from test_pipeline import TINY, metrics

from reft_jax.evaluation.intervals import wilson
from reft_jax.evaluation.records import read_records
from reft_jax.evaluation.results import COLUMNS
from reft_jax.model.heads import ValueHead
from reft_jax.model.hf import load_hf, load_value_head
from reft_jax.model.hf_write import save_hf
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.parallel import hosts
from reft_jax.parallel.mesh import abstract_arrays, make_mesh
from reft_jax.run.executions import LOG_NAME, read_executions
from reft_jax.stages.rollout import shares
from reft_jax.tasks import prompts
from reft_jax.tasks.prompts import make_prompter
from reft_jax.tasks.tokenizer import encode, train_bpe
from reft_jax.train.checkpoints import load_params
from reft_jax.train.state import abstract_params
from reft_jax.types import Prompt

ROOT = Path(__file__).resolve().parents[1]
MESH = ["mesh.fsdp=4", "mesh.tensor=2"]  # of eight devices: rows and weights are spread over both hosts
SMALLER = """
data.pad_multiple=96 sft.max_len=96 rl.max_prompt=80 rl.max_len=96 sample.max_len=96 rerank.max_len=192
sft.learning_rate=1e-3
""".split()
SOON_S = 3 * 60  # "about 60 s", on a machine that does other things as well


class Ended(NamedTuple):
    """How a host ended: its exit code, and what it said on the terminal."""

    code: int
    said: str


def start(words: list[str], number: int, port: int, log: Path, **environment) -> subprocess.Popen:
    """Host `number` of two."""
    place = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={number}"]
    with log.open("w") as file:
        return subprocess.Popen(
            words + place, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=file
        )


def wait(processes: list[subprocess.Popen], logs: list[Path], timeout: float) -> list[Ended]:
    """Whoever has not ended after `timeout` seconds is killed: its code is -9."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in processes:
        process.kill()
    codes = [process.wait() for process in processes]
    time.sleep(1)  # for what copies their last words
    return [Ended(*one) for one in zip(codes, [log.read_text() for log in logs], strict=True)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def write_inputs(folder: Path) -> None:
    """Data of small sums, and a model that answers `return` and any digit, or breaks off: all three rewards occur.

    Its logits follow from the last token alone: the matrix of outputs is made of the embeddings of what goes before.
    """
    rows = []
    for i in range(61):
        a, b = 1 + i % 4, 1 + i // 4 % 5
        question = f"Ann has {a} pens and finds {b}. How many pens has she?"
        cot = prompts.forced_prefix(question, "python") + f"    return {a + b}"
        rows.append({"item_id": f"gsm8k_{i}", "question": question, "answer_value": str(a + b), "answer_cot": cot})
    for name, part in (("train", rows[:48]), ("dev", rows[48:54]), ("test", rows[54:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    tokenizer = train_bpe([prompts.prompt_text(row["question"]) + row["answer_cot"] for row in rows], 300)
    shape, rng = LlamaConfig(len(tokenizer), 64, 32, 1, 2, 2, 32), np.random.default_rng(0)
    abstract = unbox(jax.eval_shape(Llama(shape).init, jax.random.key(0), np.zeros((1, 2), np.int32)))["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(np.float32), abstract)
    params["final_norm"], outputs = np.ones(64, np.float32), params["lm_head"]["kernel"]
    params["embed"] = embed = rng.normal(0, 64**-0.5, params["embed"].shape).astype(np.float32)
    whole = encode(tokenizer, prompts.prompt_text(rows[0]["question"]) + rows[0]["answer_cot"])
    answer = whole[len(make_prompter(tokenizer).prompt(rows[0]["question"])) - 1 : -1]
    follows = list(itertools.pairwise(answer))  # what goes before, what comes
    for digit in "0123456789":
        [token] = encode(tokenizer, digit)
        follows += [(answer[-1], token), (token, tokenizer.eos_token_id)]
    for before, token in [*follows, (answer[1], tokenizer.eos_token_id)]:
        outputs[:, token] += 2 * embed[before]
    save_hf(folder / "model", Llama(shape), params, tokenizer=tokenizer)


def command(name: str, workdir: Path, cache: Path, settings: tuple[str, ...] = (), *, devices: int) -> list[str]:
    """`cache` has the inputs and the compiled functions."""
    inputs = [f"data.{split}={cache / split}.json" for split in ("train", "dev", "test")]
    inputs += [f"model.path={cache / 'model'}", f"compiled={cache / 'compiled'}"]
    changed = [*TINY, *SMALLER, *MESH, *inputs, f"mesh.cpu_devices={devices}", *settings]
    config = [f"--config={ROOT / 'configs/quickstart.py'}", *(f"--config.{setting}" for setting in changed)]
    return [sys.executable, "-m", "reft_jax", name, *config, f"--workdir={workdir}"]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.EIO, "gone", "gs://b/x"), 4, "error: gs://b/x could not be reached (gone); "),
        (OSError(errno.ENOSPC, "full", "/x"), 4, "error: /x could not be written (full); "),
        (OSError(errno.EBADF, "closed", "/x"), 1, "OSError: "),
    ],
)
def test_a_disk_or_a_bucket_that_fails_ends_all_hosts_with_one_line(monkeypatch, capsys, error, code, says):
    """Of an error of the code there is also a traceback."""
    monkeypatch.setattr(hosts, "_state", hosts._State())
    for name, act in {"initialize": lambda *given: None, "count": lambda: 2, "_watch": lambda: None}.items():
        monkeypatch.setattr(hosts, name, act)

    def end_all(line: str, code: int):
        print(line)
        sys.exit(code)

    monkeypatch.setattr(hosts, "end_all", end_all)
    with pytest.raises(SystemExit) as ended, hosts.joined(None, None, None):
        raise error
    said = capsys.readouterr()
    assert ended.value.code == code and said.out.startswith(says)
    assert ("Traceback" in said.err) == (code == 1)


class Pair:
    """Two hosts that run a command each; what they say goes to files in `folder`."""

    def __init__(self, folder: Path, first: list[str], second: list[str] | None = None):
        folder.mkdir(exist_ok=True)
        self.logs, port = [folder / f"host_{i}.txt" for i in range(2)], free_port()
        self.processes = [start((first, second or first)[i], i, port, self.logs[i]) for i in range(2)]

    def ended(self, timeout: float) -> list[Ended]:
        return wait(self.processes, self.logs, timeout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """The inputs of all runs, and what one process compiled for the others."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def together(cache, tmp_path_factory) -> Path:
    """The work directory of the two."""
    folder = tmp_path_factory.mktemp("two")
    ends = Pair(folder, command("pipeline", folder / "run", cache, devices=4)).ended(900)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.said for end in ends)
    return folder / "run"


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory) -> Path:
    """The work directory of the one."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    one = command("pipeline", workdir, cache, devices=8)
    done = subprocess.run(one, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return workdir


def executed(workdir: Path, purpose: str) -> list[tuple]:
    """(item, program, outcome, reward) of every completion, as logged."""
    lines = [line for line in read_executions(workdir / LOG_NAME) if line["purpose"] == purpose]
    return [(line["item_id"], line["program"], line["outcome"], line["reward"]) for line in lines]


def test_the_first_iteration_has_the_same_tokens_and_scores(together, alone):
    ours, theirs = (executed(workdir, "reft rollout") for workdir in (together, alone))
    assert len(ours) == len(theirs) == 48
    assert ours[:16] == theirs[:16]
    assert {reward for *_, reward in ours[:16]} == {0.0, 0.1, 1.0}


def test_losses_stay_those_of_one_process(together, alone):
    for stage, names in (("sft", ["loss"]), ("reft", ["loss", "policy_loss", "value_loss", "reward", "kl"])):
        ours, theirs = metrics(together, stage), metrics(alone, stage)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for name in names:
            found, expected = ([line[name] for line in lines] for lines in (ours, theirs))
            near_zero = 0 if name == "loss" else 1e-6
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=near_zero, err_msg=name)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=near_zero, err_msg=name)


def test_the_same_rows_are_written_once_and_in_the_same_order(together, alone):
    for file in ("samples/warmup_train.jsonl", "samples/sft_test.jsonl", "samples/reft_test.jsonl"):
        ours, theirs = (read_records(d / file) for d in (together, alone))
        assert [record["item_id"] for record in ours] == [record["item_id"] for record in theirs]
        assert [len(record["predictions"]) for record in ours] == [len(record["predictions"]) for record in theirs]
    ours, theirs = ({line["item_id"] for line in read_executions(d / LOG_NAME)} for d in (together, alone))
    assert ours == theirs
    assert sum(1 for _ in read_executions(together / LOG_NAME)) == sum(1 for _ in read_executions(alone / LOG_NAME))


def test_accuracies_agree_within_their_intervals(together, alone):
    ours, theirs = (json.loads((workdir / "report.json").read_text())["rows"] for workdir in (together, alone))
    assert [row["model"] for row in ours] == [row["model"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        counted = [column for column in (*COLUMNS, "classification_accuracy") if other.get(column)]
        assert mine.keys() == other.keys() and "top1" in counted
        for column in counted:
            (low, high), (our_low, our_high) = (
                wilson(one[column]["correct"], one[column]["total"]) for one in (other, mine)
            )
            assert low <= our_high and our_low <= high, (mine["model"], column)


GROUPS = {
    "dapo that draws questions again": {"rl.algorithm": "dapo", "rl.redraws": 1, "rl.iterations": 1},
    "grpo with LoRA": {"rl.algorithm": "grpo", "rl.iterations": 2, "rl.learning_rate": 0.03, "lora.rank": 4},
}


@pytest.mark.parametrize("case", GROUPS)
def test_two_hosts_keep_the_samples_of_a_question_together(alone, cache, tmp_path, case):
    """From one warm-up model, in two processes and in one. The second iteration samples with the adapter."""
    changed = {"rl.questions": 4, "rl.samples": 4} | GROUPS[case]
    settings = tuple(f"{key}={value}" for key, value in changed.items())
    workdirs, starts = [tmp_path / "two", tmp_path / "one"], []
    for workdir, devices in zip(workdirs, (4, 8), strict=True):
        for name in ("sft", "models/warmup", "models/sft"):
            shutil.copytree(alone / name, workdir / name)
        for name in ("config.json", "versions.json"):
            shutil.copy(alone / name, workdir / name)
        starts.append(command("reft", workdir, cache, settings, devices=devices))
        starts[-1].append(f"--allow_config_change={','.join([*changed, 'mesh.cpu_devices'])}")
    ends = Pair(tmp_path / "logs", starts[0]).ended(SOON_S)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.said for end in ends)
    done = subprocess.run(starts[1], cwd=ROOT, capture_output=True, text=True, timeout=SOON_S)
    assert done.returncode == 0, done.stderr
    rows, others = (executed(workdir, "reft rollout") for workdir in workdirs)
    assert rows == others and len(rows) >= 16 * changed["rl.iterations"]
    ours, theirs = (metrics(workdir, "reft") for workdir in workdirs)
    for mine, other in zip(ours, theirs, strict=True):
        for name in {"loss", "grad_norm", "reward", "same_score", "advantage_std", "redrawn", "kl"} & other.keys():
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    if "rl.redraws" in changed:
        assert ours[0]["redrawn"] == len(rows) / 4 - 4
    else:  # the adapter is off in the reference and on in the policy
        assert ours[0]["kl"] == pytest.approx(0, abs=1e-6) and ours[1]["kl"] > 1e-3


def test_every_host_has_a_log_of_its_own_and_the_first_alone_reports(together):
    logs = {path.name: path.read_text() for path in (together / "logs").iterdir()}
    assert logs.keys() == {"host_0.log", "host_1.log"}
    assert "[8/8] evaluation" in logs["host_0.log"] and "[8/8] evaluation" in logs["host_1.log"]
    assert "voting@2" in logs["host_0.log"] and "voting@2" not in logs["host_1.log"]
    assert "reft  3/3 iterations" in logs["host_0.log"] and "reft  3/3 iterations" not in logs["host_1.log"]


def test_export_gathers_what_the_hosts_hold(together, cache, tmp_path):
    """What Orbax saved shard by shard, read here on one device, is what the exported folder has."""
    export = command("export", together, cache, devices=4) + ["--model=reft", f"--out_dir={tmp_path / 'out'}"]
    ends = Pair(tmp_path, export).ended(SOON_S)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.said for end in ends)
    model, lm = load_hf(tmp_path / "out")
    abstract = abstract_arrays(make_mesh(1, 1, 1), abstract_params(model, ValueHead(), "value_head"))
    saved = load_params(together / "models" / "reft", abstract)
    jax.tree.map(np.testing.assert_array_equal, {"lm": lm, "value_head": load_value_head(tmp_path / "out")}, saved)


def test_a_host_with_another_config_ends_both_and_is_named(cache, tmp_path):
    one, other = (command("pipeline", tmp_path / "run", cache, more, devices=4) for more in ((), ("sft.epochs=3",)))
    for end in Pair(tmp_path, one, other).ended(SOON_S):
        assert end.code == 2, end.said
        assert "error: the command: sft.epochs is 3 on host 1 (" in end.said.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_rows_that_the_mesh_does_not_divide_end_both(cache, tmp_path):
    both = command("pipeline", tmp_path / "run", cache, ("engine.slots=18",), devices=4)
    for end in Pair(tmp_path, both).ended(SOON_S):
        assert end.code == 2, end.said
        assert "error: config: engine.slots must be a multiple of the 4 row shards of the mesh" in end.said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_host_ends_the_other_and_is_named(cache, together, tmp_path, killed):
    """In the middle of training. `together` is there to have filled the cache."""
    pair = Pair(tmp_path, command("pipeline", tmp_path / "run", cache, devices=4))
    begun, deadline = tmp_path / "run" / "sft" / "metrics.jsonl", time.monotonic() + 300
    while not (begun.exists() and begun.stat().st_size) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in pair.processes), [log.read_text() for log in pair.logs]
        time.sleep(0.05)
    pair.processes[killed].kill()
    end = pair.ended(SOON_S)[1 - killed]
    assert end.code not in (0, -signal.SIGKILL), end.said
    last_words = (tmp_path / "run" / "logs" / f"host_{1 - killed}.log").read_text()
    for said in (end.said, last_words):  # by the watch, or by JAX, which ends a host that waits for another
        assert "lost" in said.splitlines()[-1], said
        assert f"host {killed} (" in said or f"the leader {killed} (" in said.splitlines()[-1], said


def saved_steps(workdir: Path) -> list[int]:
    folders = (workdir / "reft" / "checkpoints").glob("[0-9]*")
    return sorted(int(folder.name) for folder in folders if (folder / "manifest.json").exists())


def test_sigterm_to_one_host_stops_both_with_the_same_step(cache, together, tmp_path):
    """And again after a restart. `together` is there to have filled the cache."""
    workdir, settings = tmp_path / "run", ("rl.iterations=200", "rl.save_every=200", "rl.eval_every=200")
    both, begun, steps = command("pipeline", workdir, cache, settings, devices=4), workdir / "reft/metrics.jsonl", []
    for asked in (1, 0):
        pair, deadline, before = Pair(tmp_path, both), time.monotonic() + 300, steps[-1] if steps else 0
        while not (begun.exists() and len(begun.read_text().splitlines()) > before) and time.monotonic() < deadline:
            assert all(process.poll() is None for process in pair.processes), [log.read_text() for log in pair.logs]
            time.sleep(0.05)
        pair.processes[asked].send_signal(signal.SIGTERM)
        for end in pair.ended(SOON_S):
            assert end.code == 75, end.said
            assert "stopped by a signal to one of the hosts" in end.said
        assert steps == saved_steps(workdir)[:-1]  # the one before is kept
        steps = saved_steps(workdir)
        about = json.loads((workdir / "reft/checkpoints" / str(steps[-1]) / "step.json").read_text())["info"]
        written = steps[-1] - bool(about["pending"])  # a stop may come between an iteration and its line
        assert [json.loads(line)["step"] for line in begun.read_text().splitlines()] == list(range(1, written + 1))
    assert f"reft: resuming after {steps[0]}\n" in (workdir / "logs" / "host_1.log").read_text()


TALKS = {
    # case: exit code, what the last line of both says
    "differ": (2, "error: things: size is [1] on host 1 ("),
    "are at different places": (2, ") is at 'place 1', host 0 ("),
    "fail": (1, "ValueError: no good"),
}


@pytest.mark.parametrize("case", TALKS)
def test_hosts_that_talk_end_together(case, tmp_path):
    logs, port = [tmp_path / f"{i}.txt" for i in range(2)], free_port()
    path = os.pathsep.join([str(ROOT), *sys.path])
    processes = [start([sys.executable, __file__, case], i, port, logs[i], PYTHONPATH=path) for i in range(2)]
    code, says = TALKS[case]
    for end in wait(processes, logs, SOON_S):
        assert end.code == code, end.said
        assert says in end.said.splitlines()[-1]


def test_a_process_alone_talks_to_itself():
    assert hosts.is_first() and hosts.count() == 1
    assert hosts.gather("x", {"a": 1}) == [{"a": 1}] and hosts.from_first("y", lambda: 2) == 2
    hosts.agree("z", a=1)


def test_programs_are_dealt_out_by_question(monkeypatch):
    asked = [Prompt(item, sample, np.zeros(1, np.int32)) for item in ("a", "b", "c", "b") for sample in range(2)]
    assert shares(asked) == [0] * 8
    monkeypatch.setattr(hosts, "count", lambda: 2)
    assert shares(asked) == [0, 0, 1, 1, 0, 0, 1, 1]


def talk(case: str, coordinator: str, num_processes: int, process_id: int) -> None:
    with hosts.joined(coordinator, num_processes, process_id):
        assert hosts.gather("all", {"from": process_id}) == [{"from": 0}, {"from": 1}]
        assert hosts.from_first("one", lambda: [process_id, 0.1]) == [0, 0.1]
        assert [len(text) for text in hosts.gather("much", "x" * 5_000_000)] == [5_000_000] * 2
        hosts.agree("things", size=[0], name="same")
        if case == "differ":
            hosts.agree("things", size=[process_id], name="same")
        if case == "are at different places":
            hosts.gather(f"place {process_id}", None)
        if process_id == 0:
            raise ValueError("no good")
        time.sleep(SOON_S)


if __name__ == "__main__":
    told = dict(argument.lstrip("-").split("=") for argument in sys.argv[2:])
    talk(sys.argv[1], told["coordinator"], int(told["num_processes"]), int(told["process_id"]))
