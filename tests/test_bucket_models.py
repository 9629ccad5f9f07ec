"""Model folders, logs of hosts, the page and trackers of a run in a bucket, on an emulator of the store."""

import subprocess

import numpy as np
import pytest
from emulator import BUCKET, emulator, environment, pointed_at
from test_page import workdir_with
from test_trackers import SOURCE, calls

from reft_jax import store
from reft_jax.config import default_config
from reft_jax.page.build import PAGE, page, write_page
from reft_jax.train.trackers import MetricsWriter
from reft_jax.types import InputError


@pytest.fixture
def url(tmp_path):
    with emulator(tmp_path) as url, pointed_at(url):
        yield url


@pytest.fixture
def folder(url):
    return store.as_path(f"{BUCKET}/folder")


def test_weights_are_read_by_ranges_into_shards_and_nothing_is_copied(folder, monkeypatch):
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from tiny import tiny_model

    from reft_jax import load_hf, save_hf
    from reft_jax.bucket import BucketPath

    model, params = tiny_model()
    save_hf(folder, model, params)
    with pytest.raises(InputError, match="already exists"):
        save_hf(folder, model, params)
    read, ranges = BucketPath.read_range, []

    def noted(self, start: int, size: int) -> bytes:
        ranges.append((self.name, size))
        return read(self, start, size)

    monkeypatch.setattr(BucketPath, "read_range", noted)
    here = store.readable(folder)
    weights = here / "model.safetensors"
    whole = weights.stat().st_size
    assert whole == store.origin(weights).stat().st_size and store.origin(here / "x") == folder / "x"
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    where = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec("x")), params)
    _, loaded = load_hf(here, shardings=where)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    largest = max(size for name, size in ranges if name == weights.name)
    assert largest < whole / 4 and np.count_nonzero(np.memmap(weights, np.uint8, "r")) < whole / 4


def test_only_the_rows_of_a_shard_are_read(tmp_path):
    from reft_jax.model.safetensors import map_tensor, read_header, write_tensors

    array, path = np.arange(12 * 5, dtype=np.float32).reshape(12, 5), tmp_path / "a.safetensors"
    write_tensors(path, {"a": (array.dtype, array.shape)}, [array])
    stored = read_header(path)["a"]
    np.testing.assert_array_equal(map_tensor(stored, 4, slice(1, 3)).reshape(2, 3, 5), array.reshape(4, 3, 5)[1:3])
    np.testing.assert_array_equal(map_tensor(stored), array)


def test_what_a_host_prints_is_in_the_bucket_also_after_its_end(folder, url):
    from reft_jax.parallel import host_log

    words, more = host_log.copier(folder, 1, 2, "last words")
    said = subprocess.run(
        words, env=more | environment(url), input=b"one\nJAX distributed service detected fatal errors\n", stdout=-1
    )
    assert said.stdout.decode().splitlines()[0] == "one"
    assert (folder / "host_1.err.log").read_text().splitlines()[::2] == ["one", "last words"]


def test_the_page_of_a_work_directory_is_the_same_and_written_there(folder, tmp_path):
    here = workdir_with(tmp_path / "folder", 5)
    store.upload(here, folder)
    with (folder / "samples" / "sft_test.jsonl").open("a") as file:
        file.write("half a line")
    assert write_page(folder) == folder / PAGE
    assert (folder / PAGE).read_text() == page(here)


def test_a_tracker_gets_a_folder_of_this_machine_and_whole_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "mine.py").write_text(SOURCE)
    config = default_config()
    config.tracking = f"jsonl,{tmp_path}/mine.py:Calls"
    with MetricsWriter(folder / "reft", config) as writer:
        writer.write(1, {"loss": 0.5})
    told = calls(store.local(folder / "reft"))
    assert told[1:] == [["log", 1, {"loss": 0.5}], ["file", "metrics.jsonl", 1], ["close"]]
    assert {path.name for path in (folder / "reft").iterdir()} == {"metrics.jsonl", "tracking.json"}
