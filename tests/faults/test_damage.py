"""Any damage to the files of the newest step is noticed, and the step before it is used."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_checkpoints import abstract, assert_same_bits, some_state

from reft_jax.train.checkpoints import Checkpoints, load_params, save_params
from reft_jax.train.checksums import array_checksums, damage, write_manifest
from reft_jax.types import InputError

SHAPES = abstract(some_state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, 2, {"config": "of a test"})
    for step in (1, 2):
        checkpoints.save(step, some_state(step), {"best": step})
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files(folder: Path) -> list[str]:
    """Of the newest step."""
    return sorted(str(path.relative_to(folder / "2")) for path in (folder / "2").rglob("*") if path.is_file())


def assert_noticed(folder: Path, capsys) -> str:
    """The reason why step 2 was not used; step 1 was, and the next save succeeds."""
    checkpoints = Checkpoints(folder, 2, {})
    restored = checkpoints.restore(SHAPES)
    assert restored.step == 1 and restored.info == {"best": 1} and restored.made_by == {"config": "of a test"}
    assert_same_bits(restored.state, some_state(1))
    told = json.loads((folder / "quarantine" / "reasons.jsonl").read_text().splitlines()[-1])
    assert told["step"] == 2 and (folder / "quarantine" / "2").is_dir()
    assert f"step 2 is not used ({told['reason']})" in capsys.readouterr().out
    checkpoints.save(2, some_state(3), {"best": 3})
    checkpoints.close()
    again = Checkpoints(folder, 2, {})
    restored = again.restore(SHAPES)
    again.close()
    assert restored.step == 2
    assert_same_bits(restored.state, some_state(3))
    return told["reason"]


def test_every_file_deleted_or_cut(saved, tmp_path, capsys):
    names = files(saved)
    kinds = {"manifest.json", "step.json", "_METADATA", "_sharding", "_CHECKPOINT_METADATA", "manifest.ocdbt"}
    assert kinds <= {Path(name).name for name in names} and any("/d/" in name for name in names)
    for name in names:
        for harm in ("deleted", "cut", "emptied", "longer"):
            place = tmp_path / f"{harm} {name.replace('/', ' ')}"
            folder = Path(shutil.copytree(saved, place))
            path = folder / "2" / name
            content = path.read_bytes()
            if harm == "deleted":
                path.unlink()
            else:
                cut = {"cut": content[: len(content) // 2], "emptied": b"", "longer": content + b"\0"}[harm]
                if cut == content:
                    continue  # an empty file has nothing to lose
                path.write_bytes(cut)
            reason = assert_noticed(folder, capsys)
            assert name in reason or name == "manifest.json", (harm, name, reason)


def test_twenty_bits_flipped_anywhere(saved, tmp_path, capsys):
    rng = random.Random(0)
    places = [(name, at) for name in files(saved) for at in range((saved / "2" / name).stat().st_size)]
    for number, (name, at) in enumerate(rng.sample(places, 20)):
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        content = bytearray((folder / "2" / name).read_bytes())
        content[at] ^= 1 << rng.randrange(8)
        (folder / "2" / name).write_bytes(content)
        assert_noticed(folder, capsys)


def test_every_bit_of_the_manifest(saved, tmp_path):
    """The list of checksums has its own checksum, so that a flipped bit in it is noticed."""
    path = Path(shutil.copytree(saved / "2", tmp_path / "2")) / "manifest.json"
    content = path.read_bytes()
    rng = random.Random(1)
    for at in rng.sample(range(len(content)), 100):
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        assert damage(path.parent), at
    path.write_bytes(content)
    assert damage(path.parent) is None


def test_an_array_that_is_not_the_one_that_was_saved(folder, capsys):
    """Files that fit their manifest and arrays that do not fit their checksums: wrong before they were written."""
    about = json.loads((folder / "2" / "step.json").read_text())
    name = next(name for name in about["arrays"] if "'w'" in name)
    about["arrays"][name] = f"{int(about['arrays'][name], 16) ^ 1:08x}"
    (folder / "2" / "step.json").write_text(json.dumps(about))
    write_manifest(folder / "2")
    assert name in assert_noticed(folder, capsys)


def test_a_file_too_many(folder, capsys):
    (folder / "2" / "state" / "d" / "extra").write_text("")
    assert "state/d/extra does not belong there" == assert_noticed(folder, capsys)


def test_an_empty_stray_newer_step(folder):
    (folder / "30").mkdir()
    checkpoints = Checkpoints(folder, 2, {})
    assert checkpoints.restore(SHAPES).step == 2
    checkpoints.save(3, some_state(3), {})
    checkpoints.close()
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3", "quarantine"]


def test_a_run_whose_every_step_is_damaged_never_begins_again_by_itself(folder):
    for step in ("1", "2"):
        (folder / step / "step.json").write_text("{")
    for _ in range(2):
        checkpoints = Checkpoints(folder, 2, {})
        with pytest.raises(InputError, match=r"no saved step can be used \(2: step.json .*; 1: step.json .*or remove"):
            checkpoints.restore(SHAPES)
        checkpoints.close()
    shutil.rmtree(folder)
    checkpoints = Checkpoints(folder, 2, {})
    assert checkpoints.restore(SHAPES) is None
    checkpoints.close()


def test_a_first_step_that_was_only_half_written_is_none(folder, capsys):
    """Nobody ever had it: the run begins, and says so."""
    shutil.rmtree(folder / "1")
    (folder / "2" / "manifest.json").unlink()
    checkpoints = Checkpoints(folder, 2, {})
    assert checkpoints.restore(SHAPES) is None
    assert "step 2 is not used (no manifest.json: it was only half written)" in capsys.readouterr().out
    checkpoints.save(1, some_state(1), {})
    checkpoints.close()


def test_quarantine_keeps_the_last_step_and_every_reason(folder):
    shutil.copytree(folder / "2", folder / "3")
    for step in ("3", "2"):
        (folder / step / "step.json").unlink()
    checkpoints = Checkpoints(folder, 2, {})
    assert checkpoints.restore(SHAPES).step == 1
    checkpoints.close()
    assert len((folder / "quarantine" / "reasons.jsonl").read_text().splitlines()) == 2
    assert len([path for path in (folder / "quarantine").iterdir() if path.is_dir()]) == 1


def test_a_damaged_model_is_wrong_input(tmp_path):
    params = some_state(1).params
    save_params(tmp_path / "sft", params)
    [path, *_] = (path for path in (tmp_path / "sft" / "d").iterdir() if path.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="sft: the model is damaged .*another SHA-256.* restore it from a copy"):
        load_params(tmp_path / "sft", abstract(params))


def test_checksums_tell_elements_places_and_bits_apart():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    [whole] = array_checksums([x]).values()
    assert [whole] == list(array_checksums([jax.numpy.asarray(x)]).values())
    others = []
    for _ in range(50):
        flipped, (i, j) = x.copy(), (rng.integers(5), rng.integers(6))
        flipped.view(np.uint32)[i, j] ^= np.uint32(1) << np.uint32(rng.integers(32))
        others += array_checksums([flipped]).values()
    swapped = x.copy()
    swapped[0, 0], swapped[4, 5] = x[4, 5], x[0, 0]
    others += array_checksums([swapped]).values()
    assert whole not in others
    bits, total = x.view(np.uint32).astype(np.uint64).reshape(-1), 0
    for index, value in enumerate(bits.tolist()):  # the sum by hand
        mixed = index * 0x9E3779B1 % 2**32
        total += value * ((mixed ^ mixed >> 15) | 1)
    assert whole == f"{total % 2**32:08x}"
