"""Buckets, on an emulator of the store: what is appended, renamed, locked and read, with faults and without."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from emulator import BUCKET, emulator, environment, faulty, pointed_at

from reft_jax import __main__, store
from reft_jax.types import InputError, SaveError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with emulator(tmp_path_factory.mktemp("emulator")) as url, pointed_at(url):
        yield url


@pytest.fixture
def folder(url, request):
    """A new folder in the bucket."""
    return store.as_path(f"{BUCKET}/{request.node.name}")


def forget() -> None:
    """As if this process had been killed: what it appended and did not upload is lost."""
    from reft_jax import appends

    appends._tails.clear()


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- files


def test_lines_in_parts_are_read_as_one_file_by_every_process(folder):
    path = folder / "metrics.jsonl"
    with path.open("a", encoding="utf-8", buffering=1) as file:
        file.write("one\n")
        file.flush()
        file.write("two é\n")
        assert path.read_text() == "one\ntwo é\n"
    forget()
    assert path.read_text(encoding="utf-8") == "one\ntwo é\n"
    assert path.open("rb").read() == "one\ntwo é\n".encode()
    assert names(folder) == ["metrics.jsonl"] == [entry.name for entry in folder.iterdir()]
    with path.open("ab") as file:  # a later process
        file.write(b"three\n")
    assert path.read_text().splitlines() == ["one", "two é", "three"]


def test_a_part_that_was_uploaded_twice_is_read_once_and_one_of_an_older_object_never(folder):
    path = folder / "log"
    with path.open("ab") as file:
        file.write(b"0123")
    generation = path.stat().st_ino
    path.put_part(generation, 2, b"XXXX")  # begins within what is there already
    path.put_part(generation - 1, 4, b"YYYY")
    assert path.read_bytes() == b"0123"
    path.put_part(generation, 9, b"ZZZZ")  # what is before it is lost
    with pytest.raises(OSError, match="a part is missing after byte 4"):
        path.read_bytes()


def test_a_file_that_is_replaced_loses_its_parts(folder):
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write("old\n")
    store.write_whole(path, "new\n")
    with path.open("a") as file:
        file.write("newer\n")
    forget()
    assert path.read_text() == "new\nnewer\n"


def test_a_torn_end_is_cut_off(folder):
    path = folder / "log"
    path.write_bytes(b"whole, torn")
    with path.open("rb+") as file:
        assert file.read() == b"whole, torn"
        file.truncate(5)
        file.write(b"!")
    forget()
    assert path.read_bytes() == b"whole!"


def test_a_marker_is_never_seen_before_the_lines_that_were_appended_first(folder):
    file = (folder / "metrics.jsonl").open("a")
    file.write("line\n")
    store.write_whole(folder / "done.json", "{}")
    forget()
    assert (folder / "metrics.jsonl").read_text() == "line\n"


def test_what_is_appended_goes_up_by_itself(folder, monkeypatch):
    monkeypatch.setattr("reft_jax.appends.UPLOAD_S", 0.05)
    from reft_jax import appends

    appends._start_uploads.cache_clear()
    file = (folder / "log").open("a")
    file.write("line\n")
    deadline = time.monotonic() + 10
    while not list((folder / "log.parts")._objects(f"{folder._key}/log.parts/")) and time.monotonic() < deadline:
        time.sleep(0.05)
    forget()
    assert (folder / "log").read_text() == "line\n"


def test_a_folder_is_there_once_its_marker_is_and_goes_with_it(folder, monkeypatch):
    """The objects that are copied and removed, in their order."""
    from reft_jax import bucket

    model, asked, ask = folder / "best_1", [], bucket._ask
    for name in ("manifest.json", "state/a", "state/b", "arrays.json"):
        (model / name).write_text(name)
    (folder / "best_10" / "manifest.json").write_text("another")

    def noted(path, method, *args, **kwargs):
        if method == "cp_file":
            asked.append(("copy", args[0].rpartition("best_1/")[2]))
        elif args[:1] == ("DELETE",):
            asked.append(("remove", args[3].rpartition("best_1/")[2]))
        return ask(path, method, *args, **kwargs)

    monkeypatch.setattr(bucket, "_ask", noted)
    assert store.published(model) and not store.published(folder / "reft")
    model.rename(folder / "reft")
    assert asked[3] == ("copy", "manifest.json") and asked[4] == ("remove", "manifest.json") and len(asked) == 8
    assert names(folder / "reft") == ["arrays.json", "manifest.json", "state/a", "state/b"]
    assert store.published(folder / "reft") and not store.published(model) and not model.exists()
    assert names(folder / "best_10") == ["manifest.json"]
    store.remove(folder / "reft")
    assert asked[8][1].endswith("/reft/manifest.json") and not (folder / "reft").exists()


def test_the_object_that_stands_for_an_empty_folder_is_no_file(folder):
    from reft_jax.bucket import _store

    (folder / "a" / "file").write_text("x")
    _store().pipe_file(f"{folder._key}/a/", b"")
    assert names(folder) == ["a/file"] and [path.name for path in (folder / "a").iterdir()] == ["file"]


def test_half_a_model_is_none(folder):
    (folder / "reft" / "arrays.json").write_text("{}")
    assert not store.published(folder / "reft") and (folder / "reft").exists()


def test_damage_of_a_folder_is_found_by_the_stores_checksums(folder):
    from reft_jax.train.checksums import damage, write_manifest

    for name in ("state/a", "step.json"):
        (folder / name).write_text(name)
    assert damage(folder) == "no manifest.json: it was only half written"
    write_manifest(folder)
    assert damage(folder) is None
    (folder / "state" / "a").write_text("state/b")
    assert damage(folder).startswith("state/a has another ")
    (folder / "state" / "a").unlink()
    assert damage(folder) == "state/a is missing"


def test_a_large_file_is_read_block_by_block(folder, monkeypatch):
    from reft_jax import bucket

    monkeypatch.setattr(bucket, "BLOCK", 1000)
    content = np.random.default_rng(0).bytes(3500)
    (folder / "weights").write_bytes(content)
    with (folder / "weights").open("rb") as file:
        assert file.read(10) == content[:10] and file.read() == content[10:]
        assert file.seek(3000) == 3000 and file.read(600) == content[3000:]


def test_wrong_buckets_are_one_line(url, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="--workdir: cannot write to gs://nobody/run .*no such bucket"):
        __main__.run_command(["sft", "--config=configs/quickstart.py", "--workdir=gs://nobody/run"])
    with pytest.raises(InputError, match=f"--out_dir: {BUCKET}/x is in a bucket, and this command works on a disk"):
        __main__.run_command(["convert", "gsm8k", f"--in={tmp_path}/no.jsonl", f"--out_dir={BUCKET}/x"])
    with pytest.raises(InputError, match="gs://nobody/train.json: cannot be read"):
        store.read_text("gs://nobody/train.json")


# --- the lock


HOLDS = """
import sys, time
from reft_jax import store
from reft_jax.run import lock

lock.BEAT_S = 0.2
with lock.held(store.as_path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(folder, url):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)],
        cwd=ROOT,
        env=os.environ | environment(url),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_start_is_refused_at_once_and_takes_over_from_a_killed_one(folder, holder, capsys):
    from reft_jax.run import lock

    def took(*words: str) -> tuple[subprocess.CompletedProcess, float]:
        began = time.monotonic()
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        return done, time.monotonic() - began

    _, imports = took("-c", "import reft_jax.run.open")  # on a busy machine they alone can take minutes
    second, seconds = took("-m", "reft_jax", "sft", "--config=configs/quickstart.py", f"--workdir={folder}")
    assert seconds - imports < 3 * 5
    assert second.returncode == 2 and second.stdout == ""
    [said] = second.stderr.splitlines()
    assert said.startswith(f"error: --workdir: {folder} is in use by process {holder.pid} on host ")
    assert "a start takes it over as soon as that process has ended" in said
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock.held(folder):
        assert json.loads((folder / lock.LOCK_NAME).read_text())["pid"] == os.getpid()
    assert f"takes over from process {holder.pid} on host" in capsys.readouterr().out
    assert not (folder / lock.LOCK_NAME).read_text()


def test_a_holder_elsewhere_lives_as_long_as_it_writes(folder, monkeypatch, capsys):
    from reft_jax.run import lock

    def leave() -> None:
        text = json.dumps(lock._myself(folder)._asdict() | {"machine": "another", "pid": 7, "host": "other"})
        (folder / lock.LOCK_NAME).write_text(text)

    leave()
    with pytest.raises(InputError, match=r"process 7 on host other .*takes it over at \d{4}-.* if it gives no sign"):
        lock.look(folder)
    monkeypatch.setattr(lock, "SILENCE_S", 1.0)
    time.sleep(2.5)  # the store's clock shows whole seconds
    with lock.held(folder):
        pass
    assert "takes over from process 7 on host other" in capsys.readouterr().out


def test_of_many_that_take_over_at_one_moment_one_does(folder):
    path = folder / "lock.json"
    for before in ("", "stale"):
        if before:
            path.write_text(before)
        together = threading.Barrier(8)

        def take(number, before=before, together=together):
            together.wait()
            return store.swap(path, before, f"mine {number}")

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(take, range(8)))
        assert sum(won) == 1 and path.read_text() == f"mine {won.index(True)}"
    assert not store.swap(path, "another", "x") and store.swap(path, path.read_text(), "")


def test_signs_of_life_are_writes_of_the_holder_only(folder):
    path = folder / "lock.json"
    assert store.swap(path, "", "mine")
    first = path.stat().st_ino
    store.touch(path, "mine")
    assert path.stat().st_ino > first and store.silence(path) < 3
    path.write_text("theirs")
    store.touch(path, "mine")
    assert path.read_text() == "theirs"


# --- faults


def test_nothing_is_lost_or_half_read_if_one_request_in_ten_fails(tmp_path, impatient):
    def work(number: int) -> None:
        place = store.as_path(f"{BUCKET}/faults/{number}")
        assert store.swap(place / "lock.json", "", f"mine {number}")
        with (place / "log").open("a") as file:
            for line in range(12):
                file.write(f"{line}\n")
                file.flush()
        (place / "new" / "arrays").write_bytes(bytes([number]) * 100_000)
        store.write_whole(place / "new" / "manifest.json", "{}")
        (place / "new").rename(place / "model")
        assert store.swap(place / "lock.json", f"mine {number}", "")

    with faulty(tmp_path, 0.1) as proxy, pointed_at(proxy.url):
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        assert all(proxy.made.values()), proxy.made
        proxy.share = 0.0
        forget()
        for number in range(6):
            place = store.as_path(f"{BUCKET}/faults/{number}")
            assert (place / "log").read_text() == "".join(f"{line}\n" for line in range(12))
            assert (place / "model" / "arrays").read_bytes() == bytes([number]) * 100_000
            assert names(place) == ["lock.json", "log", "model/arrays", "model/manifest.json"]


def test_a_store_that_is_gone_ends_the_run_with_one_line(tmp_path, impatient, monkeypatch):
    with faulty(tmp_path, 0.0) as proxy, pointed_at(proxy.url):
        path = store.as_path(f"{BUCKET}/gone/report.json")
        path.write_text("old")
        proxy.gone = True
        with pytest.raises(SaveError) as gone:
            store.write_whole(path, "new")
        said = str(gone.value)
        assert said.startswith(f"{path} could not be written (the bucket refuses or does not answer: ")
        assert said.endswith("see to the bucket, your rights in it and the network, then run the same command again")
        assert SaveError.exit_code == 4 and "\n" not in said
        for ask in (path.exists, path.is_file, path.is_dir, path.read_bytes):  # never "there is none"
            with pytest.raises(OSError, match="does not answer"):
                ask()


def test_a_lock_that_cannot_be_released_is_left_behind(tmp_path, impatient):
    from reft_jax.run import lock

    with faulty(tmp_path, 0.0) as proxy, pointed_at(proxy.url):
        with lock.held(store.as_path(f"{BUCKET}/run")):
            proxy.gone = True


def test_a_holder_outlives_a_store_that_is_away_for_a_moment(tmp_path, impatient, monkeypatch):
    from reft_jax.run import lock

    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with faulty(tmp_path, 0.0) as proxy, pointed_at(proxy.url):
        place = store.as_path(f"{BUCKET}/run")
        with lock.held(place):
            proxy.gone = True
            time.sleep(1.5)
            proxy.gone = False
            before, deadline = (place / lock.LOCK_NAME).stat().st_ino, time.monotonic() + 20
            while (place / lock.LOCK_NAME).stat().st_ino == before and time.monotonic() < deadline:
                time.sleep(0.05)
            assert (place / lock.LOCK_NAME).stat().st_ino > before
            ended = []
            monkeypatch.setattr(lock.hosts, "end_all", lambda *said: ended.append(said))
            monkeypatch.setattr(store, "PATIENCE_S", 0.5)
            proxy.gone = True
            while not ended and time.monotonic() < deadline:
                time.sleep(0.05)
            line, code = ended[0]
            assert line.startswith(f"error: {place} was out of reach for ") and code == SaveError.exit_code
            proxy.gone = False
