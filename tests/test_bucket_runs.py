"""Whole runs whose work directory is in a bucket, beside the same runs on a disk: killed, with faults, on two hosts."""

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from emulator import BUCKET, Faults, emulator, faulty, pointed_at
from test_pipeline import command

from reft_jax import store
from reft_jax.evaluation.records import read_records
from reft_jax.page.text import item_text

ROOT = Path(__file__).resolve().parents[1]
VARYING = ("seconds", "compiles", "executor_retries", "made")
STAGES = ("sft", "reft", "rerank_sft", "rerank_reft")
KILLS = 5
SOON_S = 3 * 60  # "about 60 s" until a host has noticed that another one is lost
UPLOAD = 8  # of about 17 of a step's state: the first arrays are up
SAVES = """
import os, sys
from reft_jax.train import checkpoints

def killed(folder):
    os.kill(os.getpid(), 9)

checkpoints.write_manifest = killed  # when all of a step is up but its manifest
from reft_jax.__main__ import main
main()
"""


def start(name: str, workdir, cache: Path, scratch: Path, *more: str, code: str = "", log=subprocess.DEVNULL):
    """A process of a command, on a machine whose scratch folder is empty."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    words = command(name, workdir, f"--config.compiled={cache}", *more)
    if code:
        words[1:3] = ["-c", code]
    return subprocess.Popen(
        words, cwd=ROOT, env=os.environ | {"TMPDIR": str(scratch)}, stdout=log, stderr=subprocess.STDOUT
    )


def killed_in_an_upload(proxy: Faults, name: str, workdir, cache: Path, scratch: Path) -> Path:
    """Starts a command and kills it in the middle of the upload of its second step. Returns that step's folder."""
    process = start(name, workdir, cache, scratch)
    proxy.in_a_save = (2, UPLOAD, process.kill)
    assert process.wait(timeout=600) == -signal.SIGKILL
    steps = {folder: {path.name for path in folder.rglob("*")} for folder in (workdir / "sft/checkpoints").iterdir()}
    [half] = [folder for folder, files in steps.items() if "manifest.json" not in files]
    assert "step.json" in steps[half] and "commit_success.txt" not in steps[half]
    assert any(path.parent.name == "d" for path in half.rglob("*")), steps[half]  # arrays
    assert len(steps) == 2  # the one before is whole
    return half


def whole(name: str, workdir, cache: Path, scratch: Path, *more: str) -> str:
    """What a command prints that ends well."""
    log = scratch.with_suffix(".log")
    with log.open("w") as file:
        code = start(name, workdir, cache, scratch, *more, log=file).wait(timeout=1800)
    assert code == 0, log.read_text()
    return log.read_text()


def constant(value):
    """A JSON value without what varies from run to run."""
    if isinstance(value, dict):
        return {key: constant(entry) for key, entry in value.items() if not key.startswith(VARYING)}
    return [constant(entry) for entry in value] if isinstance(value, list) else value


def results(workdir, stages=STAGES) -> dict:
    """What a run leaves: of each stage its lines, its result with the checksum of the last state, and its arrays."""
    found = {}
    for stage in stages:
        lines = [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
        found[stage] = constant(lines), constant(json.loads((workdir / stage / "done.json").read_text()))
    for model in ("warmup", *stages):
        found[f"models/{model}"] = json.loads((workdir / "models" / model / "arrays.json").read_text())
    if (workdir / "report.json").exists():
        found["report"] = constant(json.loads((workdir / "report.json").read_text()))
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def on_disk(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    whole("pipeline", folder / "run", cache, folder / "scratch")
    return results(folder / "run")


def test_a_stage_that_was_killed_in_a_save_ends_as_on_a_disk(cache, tmp_path):
    """The short test of those below: one kill, and answers that are sampled afterwards."""
    scratch = tmp_path / "scratch"

    said = []

    def ended(workdir) -> tuple[dict, list[dict]]:
        said.append(whole("sft", workdir, cache, scratch))
        whole("sample", workdir, cache, scratch, "--model=sft")
        answers = read_records(workdir / "samples" / "sft_test.jsonl")
        assert "== sft, samples: " in item_text(workdir, answers[0]["item_id"])
        return results(workdir, ["sft"]), answers

    with faulty(tmp_path, 0.0) as proxy, pointed_at(proxy.url):
        workdir = store.as_path(f"{BUCKET}/run")
        half = killed_in_an_upload(proxy, "sft", workdir, cache, scratch)
        assert ended(workdir) == ended(tmp_path / "run")
        assert f"step {half.name} is not used (no manifest.json: it was only half written)" in said[0]
        assert f"sft: resuming after {int(half.name) // 2}\n" in said[0]


@pytest.mark.long
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_pipeline_that_is_killed_ends_as_on_a_disk(share, on_disk, cache, tmp_path):
    """share: of the requests that fail."""
    chance = random.Random(round(share * 10))
    with faulty(tmp_path, share) as proxy, pointed_at(proxy.url):
        workdir, scratch = store.as_path(f"{BUCKET}/run"), tmp_path / "scratch"
        saves = start("pipeline", workdir, cache, scratch, code=SAVES)
        assert saves.wait(timeout=600) == -signal.SIGKILL
        up = {path.name for path in (workdir / "sft").rglob("*")}
        assert "arrays.json" in up and "manifest.json" not in up
        killed_in_an_upload(proxy, "pipeline", workdir, cache, scratch)
        for number in range(KILLS - 1):
            with (log := tmp_path / f"{number}.log").open("w") as file:
                process = start("pipeline", workdir, cache, scratch, log=file)
            while "[1/" not in log.read_text():  # its first stage begins
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=chance.uniform(0, 40))
            process.kill()
            assert process.wait() in (-signal.SIGKILL, 0), log.read_text()
        whole("pipeline", workdir, cache, scratch)
        proxy.share = 0.0
        assert results(workdir) == on_disk
        assert all(proxy.made.values()) or not share, proxy.made
        assert "voting@2" in (workdir / "report.html").read_text()
        before = workdir.sums()
        assert "time       about " in whole("check", workdir, cache, scratch)
        assert workdir.sums() == before


@pytest.mark.long
def test_a_run_whose_store_is_gone_ends_with_one_line_and_code_4(cache, tmp_path):
    with faulty(tmp_path, 0.0) as proxy, pointed_at(proxy.url):
        workdir, log = store.as_path(f"{BUCKET}/run"), tmp_path / "log"
        with log.open("w") as file:
            process = start("sft", workdir, cache, tmp_path / "scratch", "--config.sft.epochs=400", log=file)
            while not (workdir / "sft" / "checkpoints").exists() and process.poll() is None:
                time.sleep(0.5)
            proxy.gone = True
            assert process.wait(timeout=600) == 4, log.read_text()
        last = log.read_text().splitlines()[-1]
        assert last.startswith("error: ") and "run the same command again" in last


class Two:
    """Two hosts of `sft` with two devices each; what they say goes to files in `folder`."""

    def __init__(self, workdir, cache: Path, folder: Path):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        place = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
        mesh = ["--config.mesh.cpu_devices=2", "--config.mesh.fsdp=4"]
        self.hosts, self.logs = [], [folder / f"{number}.log" for number in range(2)]
        for number, path in enumerate(self.logs):
            with path.open("w") as log:
                more = [*place, *mesh, f"--process_id={number}"]
                self.hosts.append(start("sft", workdir, cache, folder / f"scratch{number}", *more, log=log))

    def said(self) -> list[str]:
        return [path.read_text() for path in self.logs]

    def results(self, workdir) -> dict:
        assert [host.wait(timeout=1200) for host in self.hosts] == [0, 0], self.said()
        return results(workdir, ["sft"])


@pytest.fixture(scope="module")
def two_on_disk(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return Two(folder / "run", cache, folder).results(folder / "run")


@pytest.mark.long
def test_two_hosts_in_a_bucket_end_as_on_a_disk(two_on_disk, cache, tmp_path):
    with faulty(tmp_path, 0.0) as proxy, pointed_at(proxy.url):
        workdir = store.as_path(f"{BUCKET}/two")
        assert Two(workdir, cache, tmp_path).results(workdir) == two_on_disk
        names = {f"host_{number}.{kind}.log" for number, kind in itertools.product(range(2), ("out", "err"))}
        assert {path.name for path in (workdir / "logs").iterdir()} >= names


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_host_ends_the_other_and_both_resume(killed, two_on_disk, cache, tmp_path):
    with emulator(tmp_path) as url, pointed_at(url):
        workdir = store.as_path(f"{BUCKET}/two")
        two, deadline = Two(workdir, cache, tmp_path), time.monotonic() + 600
        while not (workdir / "sft" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            assert all(host.poll() is None for host in two.hosts), two.said()
            time.sleep(0.1)
        two.hosts[killed].kill()
        assert two.hosts[1 - killed].wait(timeout=SOON_S) not in (0, -signal.SIGKILL), two.said()
        two.hosts[killed].wait()
        assert "lost" in two.said()[1 - killed].splitlines()[-1]
        assert Two(workdir, cache, tmp_path).results(workdir) == two_on_disk
