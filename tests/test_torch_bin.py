"""pytorch_model*.bin files are read without PyTorch: the same tensors, and no code of a file ever runs."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from reft_jax.commands.convert_weights import run_convert_weights
from reft_jax.model.hf_folder import read_headers
from reft_jax.model.safetensors import map_tensor
from reft_jax.model.torch_bin import BinFile
from reft_jax.types import InputError

torch = pytest.importorskip("torch", reason="PyTorch writes the files of these tests")


def state_dict() -> dict:
    """Every kind that state dicts hold: three float types, a transposed view, a shared storage, a scalar, a buffer."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 4, generator=generator)
    return {
        "embed.weight": matrix,
        "tied.weight": matrix,
        "half": matrix.half(),
        "double": matrix.double(),
        "bfloat": matrix.bfloat16(),
        "turned": matrix.T,
        "slice": matrix[2:4, 1:3],
        "parameter": torch.nn.Parameter(matrix[0] * 2),
        "scalar": torch.tensor(-1e4),
        "empty": torch.zeros(0, 3),
        "causal": torch.ones(2, 2, dtype=torch.bool),
    }


def as_bits(tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.uint8).numpy() if tensor.dim() else tensor.numpy()[None].view("u1")


def assert_same(found: np.ndarray, tensor) -> None:
    assert found.shape == tuple(tensor.shape)
    np.testing.assert_array_equal(np.ascontiguousarray(found).reshape(-1).view("u1"), as_bits(tensor).reshape(-1))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_every_tensor_comes_out_bit_for_bit(tmp_path, zipped, nested):
    tensors, path = state_dict(), tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": tensors} if nested else tensors, path, _use_new_zipfile_serialization=zipped)
    file = BinFile(path)
    assert file.left_out == ["causal"]
    assert list(file.tensors) == [name for name in tensors if name != "causal"]
    for name in file.tensors:
        assert_same(file.array(name), tensors[name])


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_converted_whole(tmp_path, capsys, shards):
    source, tensors = tmp_path / "in", torch.nn.Linear(4, 3).state_dict() | state_dict()
    source.mkdir()
    names = [f"pytorch_model-{i:05d}-of-{shards:05d}.bin" for i in range(1, shards + 1)]
    names = names if shards > 1 else ["pytorch_model.bin"]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if where[name] == file}, source / file)
    if shards > 1:
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "training_args.bin").write_bytes(b"never looked at")
    run_convert_weights(source, tmp_path / "new" / "out")
    found = read_headers(tmp_path / "new" / "out")
    assert found.keys() == tensors.keys() - {"causal"}
    for name, stored in found.items():
        assert_same(map_tensor(stored), tensors[name])
    assert {path.name for path in (tmp_path / "new" / "out").iterdir() if path.suffix != ".safetensors"} == (
        {"config.json"} | ({"model.safetensors.index.json"} if shards > 1 else set())
    )
    assert "causal" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


class Calls:
    """Pickled, it says: call `function` with `args` when this is read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


HOSTILE = {
    "a command": lambda path: Calls(os.system, f"touch {path}"),
    "eval": lambda path: Calls(eval, f"open({str(path)!r}, 'w')"),
    "a getattr chain": lambda path: Calls(getattr, Calls(__import__, "os"), "system"),
    "a whole module": lambda path: torch.nn.Linear(2, 2),
    "a file": lambda path: Calls(open, str(path), "w"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_of_a_file_is_run(tmp_path, kind, zipped):
    touched, path = tmp_path / "touched", tmp_path / "pytorch_model.bin"
    tensors = {"weight": torch.ones(2), "more": HOSTILE[kind](touched)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"pytorch_model.bin: asks for [\w.]+, which is no part .* nothing was run"):
        BinFile(path)
    assert not touched.exists()


def edited(path, old: bytes, new: bytes) -> None:
    """Writes the zip again, with `old` in its pickle replaced."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    [pickled] = [name for name in entries if name.endswith("data.pkl")]
    assert entries[pickled].count(old) == 1
    entries[pickled] = entries[pickled].replace(old, new)
    rezip(path, entries)


def rezip(path, entries, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def compressed(path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    rezip(path, entries, zipfile.ZIP_DEFLATED)


def without_data(path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if "/data/" not in name}
    rezip(path, entries)


def not_little(path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    rezip(path, {name: b"big" if name.endswith("byteorder") else data for name, data in entries.items()})


DAMAGE = {
    "no file": (lambda path: path.unlink(), "is missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "folder"),
    "nothing in it": (lambda path: path.write_bytes(b""), "not a PyTorch file"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "not a PyTorch file"),
    "a git-lfs pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-300]), "not a PyTorch file"),
    "another zip": (lambda path: rezip(path, {"a": b"b"}), "not a PyTorch file"),
    "compressed": (compressed, "compressed"),
    "a big-endian machine": (not_little, "big-endian"),
    "no data": (without_data, "tensor weight lies outside"),
    # the shape (5, 7) and the strides (7, 1), as the pickle has them
    "a larger shape": (lambda path: edited(path, b"K\x05K\x07\x86", b"K\x06K\x07\x86"), "tensor weight lies outside"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "no dict of tensors"),
    "a number": (lambda path: torch.save({"weight": torch.ones(2), "epoch": 3}, path), "entry 'epoch' is no tensor"),
    "no names": (lambda path: torch.save({3: torch.ones(2)}, path), "no dict of tensors"),
    "another pickle": (lambda path: path.write_bytes(pickle.dumps({"weight": 1})), "not a PyTorch file"),
    "an endless pickle": (lambda path: path.write_bytes(b"(" * 100000), "not a PyTorch file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_one_line(tmp_path, kind):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.arange(35.0).reshape(5, 7)}, path)
    damage, words = DAMAGE[kind]
    damage(path)
    with pytest.raises(InputError, match=words) as caught:
        BinFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_that_repeats_its_storage_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.ones(1).expand(10**6, 10**6)}, path)  # four terabytes, were it written
    with pytest.raises(InputError, match="tensor weight lies outside"):
        BinFile(path)


def write_index(text: str):
    return lambda source, out: (source / "pytorch_model.bin.index.json").write_text(text)


NAME = "pytorch_model.bin"
BAD_FOLDERS = {
    "no weights": (lambda source, out: None, "neither pytorch_model.bin nor"),
    "no weight_map": (write_index("{}"), "field 'weight_map'"),
    "a file outside": (write_index('{"weight_map": {"a": "../b.bin"}}'), "field 'weight_map'"),
    "a missing shard": (write_index('{"weight_map": {"a": "b.bin"}}'), r"b\.bin: .* missing"),
    "an output in use": (lambda source, out: out.mkdir() or (out / "file").touch(), "not an empty folder"),
    "no folder": (lambda source, out: source.rmdir(), "no such folder"),
    "a link to nothing": (lambda source, out: (source / NAME).symlink_to("gone"), "is a link to gone, which is not"),
    "quantized": (
        lambda source, out: torch.save({"a.weight": torch.ones(3, dtype=torch.int8)}, source / NAME),
        r"pytorch_model\.bin: tensor a\.weight holds whole numbers: the weights are quantized; use the unquantized",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_cannot_be_converted_is_one_line(tmp_path, kind):
    make, words = BAD_FOLDERS[kind]
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    make(source, out)
    with pytest.raises(InputError, match=words):
        run_convert_weights(source, out)
    assert not out.exists() or [path.name for path in out.iterdir()] == ["file"]


def test_a_path_that_no_folder_can_have(tmp_path):
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="no such folder"):
            run_convert_weights(tmp_path / name, tmp_path / "out")


def test_what_pickles_set_on_functions_does_not_stay(tmp_path):
    """A pickle can set attributes of what `find_class` returns; the next file must not see them."""
    stream = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, stream)
    hostile = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(K\x01tstb."
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(io.BytesIO(stream.getvalue())) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    rezip(path, {name: hostile if name.endswith("data.pkl") else data for name, data in entries.items()})
    with pytest.raises(InputError, match="no dict of tensors"):
        BinFile(path)
    path.write_bytes(stream.getvalue())
    assert BinFile(path).array("weight").tolist() == [1.0, 1.0]
