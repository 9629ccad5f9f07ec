"""One run per work directory: a real second process, a killed one, and holders on other machines."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from reft_jax import __main__, store
from reft_jax.run import lock
from reft_jax.types import InputError, SaveError

ROOT = Path(__file__).resolve().parents[1]
HOLDS = """
import sys, time
from pathlib import Path
from reft_jax.run import lock

lock.BEAT_S = 0.1
with lock.held(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


def start(workdir: Path) -> subprocess.Popen:
    """A process that holds the lock of `workdir`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, workdir], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout.readline() == "holds\n"
    return process


@pytest.fixture(scope="module")
def working(tmp_path_factory):
    """A process that works in the directory `at`, in every test of this file that leaves it alone."""
    folder = tmp_path_factory.mktemp("working")
    process = start(folder / "run")
    process.at = folder / "run"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def holder(tmp_path):
    """One that a test may do anything to; it works in `tmp_path`."""
    process = start(tmp_path)
    yield process
    process.kill()
    process.communicate()


def written(workdir: Path) -> dict:
    return json.loads((workdir / lock.LOCK_NAME).read_text())


def write(workdir: Path, *, silent: float = 0.0, **changed) -> None:
    """A lock as another process would have left it."""
    workdir.mkdir(exist_ok=True)
    path = workdir / lock.LOCK_NAME
    path.write_text(json.dumps(lock._myself(workdir)._asdict() | changed))
    os.utime(path, (time.time() - silent,) * 2)


ELSEWHERE = {"host": "other", "machine": "another boot", "pid": 7, "since": "2024-01-02 03:04:05+00:00"}


def test_a_second_process_is_told_who_works_there_and_until_when(working):
    since = written(working.at)["since"]
    for act in (lambda: lock.look(working.at), lambda: lock.held(working.at).__enter__()):
        with pytest.raises(InputError) as refused:
            act()
        said = str(refused.value)
        assert f"{working.at} is in use by process {working.pid} on host {os.uname().nodename} since {since};" in said
        assert "takes it over as soon as that process has ended" in said and "\n" not in said
    assert sorted(path.name for path in working.at.iterdir()) == [lock.LOCK_NAME]


@pytest.mark.parametrize("command", [["sft"], ["evaluate", "--models=/no"], ["sample", "--model=sft"]])
def test_a_command_refuses_before_it_looks_at_its_input(working, monkeypatch, command):
    """Before data, tokenizer and devices: those of this config do not exist."""
    settings = ["model.path=/no", "data.train=/no", "data.test=/no"]
    config = ["--config=configs/quickstart.py", *(f"--config.{setting}" for setting in settings)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("reft_jax.commands.sweep.find", lambda folder: folder)
    with pytest.raises(InputError, match=f"in use by process {working.pid} on host "):
        __main__.run_command([*command, *config, f"--workdir={working.at}"])


@pytest.mark.parametrize("command", [["export", "--model=sft"], ["evaluate", "--replay"]])
def test_readers_come_in(working, monkeypatch, tmp_path, command):
    """They get as far as what is missing: a model, a log."""
    monkeypatch.chdir(ROOT)
    config = ["--config=configs/quickstart.py", f"--out_dir={tmp_path / 'out'}"] if command[0] == "export" else []
    with pytest.raises(InputError, match="has no model 'sft'|executions.jsonl.gz: no such file"):
        __main__.run_command([*command, *config, f"--workdir={working.at}"])
    assert sorted(path.name for path in working.at.iterdir()) == [lock.LOCK_NAME]


def test_a_stopped_process_keeps_its_lock_and_a_killed_one_loses_it_at_once(holder, tmp_path, capsys):
    workdir = tmp_path
    holder.send_signal(signal.SIGSTOP)
    os.utime(workdir / lock.LOCK_NAME, (0, 0))  # no sign of life for years, but it is there
    with pytest.raises(InputError, match=f"process {holder.pid} "):
        lock.look(workdir)
    holder.kill()  # and not waited for: its parent has yet to notice
    while lock._start_of(holder.pid) not in ("", "ended"):
        time.sleep(0.01)
    with lock.held(workdir):
        assert written(workdir)["pid"] == os.getpid()
    assert f"takes over from process {holder.pid} on host" in capsys.readouterr().out
    assert not (workdir / lock.LOCK_NAME).exists()


def test_a_process_id_that_was_given_again_is_another_process(tmp_path, capsys):
    write(tmp_path, started="12345")
    with lock.held(tmp_path):
        pass
    assert "takes over" in capsys.readouterr().out


def test_a_copy_of_a_work_directory_in_use_is_free_and_one_that_was_renamed_is_not(working, tmp_path, capsys):
    text = (working.at / lock.LOCK_NAME).read_text()
    (tmp_path / lock.LOCK_NAME).write_text(text)
    with lock.held(tmp_path):
        pass
    assert f"which works in {working.at}" in capsys.readouterr().out
    (tmp_path / lock.LOCK_NAME).write_text(text.replace(str(working.at), str(tmp_path / "before")))
    with pytest.raises(InputError, match=f"in use by process {working.pid} "):
        lock.look(tmp_path)


def test_a_holder_elsewhere_counts_as_dead_after_its_silence(tmp_path, capsys):
    write(tmp_path, silent=80, **ELSEWHERE)
    with pytest.raises(InputError) as refused:
        lock.look(tmp_path)
    said = str(refused.value)
    assert "process 7 on host other since 2024-01-02 03:04:05+00:00; choose" in said
    assert "if it gives no sign of life; " in said and "the last one was 80 s ago" in said
    write(tmp_path, silent=95, **ELSEWHERE)
    with lock.held(tmp_path):
        pass
    assert "takes over from process 7 on host other since" in (out := capsys.readouterr().out)
    assert "which gave no sign of life for 95 s" in out


@pytest.fixture
def naps(monkeypatch):
    """The waits of `look`, none of which takes time. `naps.then` is called at the third."""

    class Naps(list):
        then = staticmethod(lambda: None)

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            naps.then()

    naps = Naps()
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=nap, monotonic=time.monotonic))
    monkeypatch.setattr(lock.store, "silence", lambda path: 80.0 + lock.LOOK_S * len(naps))
    return naps


def test_a_start_that_waits_takes_over_when_a_holder_elsewhere_counts_as_dead(tmp_path, naps, monkeypatch, capsys):
    """As a new pod after one that was killed. A plain start is refused at once."""
    write(tmp_path, **ELSEWHERE)
    with pytest.raises(InputError, match="process 7 on host other"):
        lock.look(tmp_path)
    assert not naps
    monkeypatch.setenv("REFT_WAIT", "1")
    lock.look(tmp_path)
    assert sum(naps) == 11.0  # until 91 s of silence
    assert capsys.readouterr().out.count("REFT_WAIT is set, so this start waits for that\n") == 1


@pytest.mark.parametrize(("happens", "refused"), [("touched", True), ("another", True), ("released", False)])
def test_a_start_that_waits_knows_at_the_first_sign_of_life(tmp_path, naps, monkeypatch, happens, refused):
    def then() -> None:
        if happens == "touched":
            os.utime(tmp_path / lock.LOCK_NAME, (1, 1))
        elif happens == "another":
            write(tmp_path, **ELSEWHERE | {"pid": 8})
        else:
            (tmp_path / lock.LOCK_NAME).unlink()

    write(tmp_path, **ELSEWHERE)
    naps.then = then
    monkeypatch.setenv("REFT_WAIT", "1")
    if refused:
        with pytest.raises(InputError, match=f"process {8 if happens == 'another' else 7} on host other"):
            lock.look(tmp_path)
    else:
        lock.look(tmp_path)
    assert len(naps) == 3


def test_a_start_that_waits_is_refused_at_once_on_the_machine_of_the_holder(working, naps, monkeypatch):
    monkeypatch.setenv("REFT_WAIT", "1")
    with pytest.raises(InputError, match=f"process {working.pid} "):
        lock.look(working.at)
    assert not naps


@pytest.mark.parametrize("text", ["{", "[]", '{"pid": 1}', "null", "\xff"])
def test_a_lock_that_cannot_be_read_is_someones_until_its_silence(tmp_path, text):
    path = tmp_path / lock.LOCK_NAME
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="in use by an unknown process"):
        lock.look(tmp_path)
    os.utime(path, (0, 0))
    with lock.held(tmp_path):
        assert written(tmp_path)["pid"] == os.getpid()


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    path = tmp_path / lock.LOCK_NAME
    with lock.held(tmp_path):
        for _ in range(2):
            os.utime(path, (0, 0))
            assert soon(lambda: path.stat().st_mtime > 1)
        path.unlink()  # by hand
        assert soon(lambda: path.exists() and path.read_text() and written(tmp_path)["pid"] == os.getpid())


def soon(happens) -> bool:
    deadline = time.monotonic() + 20
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_process_that_lost_its_lock_ends_at_once(holder, tmp_path):
    """As one that was suspended for minutes: the other one writes now, and its lock stays."""
    write(tmp_path, **ELSEWHERE)
    said, _ = holder.communicate(timeout=60)
    assert holder.returncode == 2
    assert said.startswith("error: ") and "another run took over" in said and '"host": "other"' in said
    assert written(tmp_path)["host"] == "other"


def test_of_many_that_take_over_at_one_moment_one_does(tmp_path):
    path, count = tmp_path / lock.LOCK_NAME, 16
    for _ in range(20):
        path.write_text("stale")
        together = threading.Barrier(count)

        def swap(name: str, together=together) -> bool:
            together.wait()
            return store.swap(path, "stale", name)

        with ThreadPoolExecutor(count) as pool:
            took = list(pool.map(swap, map(str, range(count))))
        assert sum(took) == 1 and took[int(path.read_text())]


def test_what_was_changed_since_it_was_read_is_not_replaced(tmp_path):
    path = tmp_path / lock.LOCK_NAME
    assert store.swap(path, "", "a")
    assert not store.swap(path, "", "b") and not store.swap(path, "b", "")
    assert path.read_text() == "a"
    assert store.swap(path, "a", "") and not path.exists()
    assert not store.swap(path, "a", "") and not path.exists()


def test_a_start_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path / "new" / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    with lock.held(tmp_path / "new"):
        (tmp_path / "new" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


def test_a_lock_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(path, *args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(lock.os, "open", full)
    with pytest.raises(SaveError, match=r"lock.json could not be written \(No space"), lock.held(tmp_path):
        pass
