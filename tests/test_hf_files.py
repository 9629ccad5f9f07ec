"""Files of model folders: for links, pointers, folders and damage, one line says what the file is."""

import json
import os

import pytest
import test_hf_folder
from test_hf import assert_same, read_header, write_header
from test_hf_folder import HEAD, Q, change_header, refusal, says

from reft_jax import load_hf
from reft_jax.model.hf import check_folder
from reft_jax.types import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 269060552\n"
LORA = {"peft_type": "LORA", "base_model_name_or_path": "me/base", "r": 4}
made, copy = test_hf_folder.made, test_hf_folder.copy  # its fixtures


def write_text(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def only(name: str, text: bytes = b"x"):
    """The weights replaced by another file."""

    def only(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(text)

    return only


def dangling(name: str):
    def dangling(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("../../blobs/gone")

    return dangling


def as_folder(name: str):
    def as_folder(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return as_folder


def longer(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(bytes(100))


def offsets(change):
    """The places of q's bytes, changed."""
    return lambda folder: change_header(
        folder, lambda header: header | {Q: header[Q] | {"data_offsets": change(*header[Q]["data_offsets"])}}
    )


CONVERT = "python -m reft_jax convert weights --in="
FILES = {
    "bin": (only("pytorch_model.bin"), "PyTorch files only (pytorch_model.bin)", CONVERT, "--out_dir=DIR"),
    "bins": (only("pytorch_model-00001-of-00002.bin"), "PyTorch files only", CONVERT),
    "gguf": (only("model-Q4.gguf"), "model-Q4.gguf", "GGUF", "unquantized"),
    "consolidated": (only("consolidated.safetensors"), "its publisher's own format", "Hugging Face format"),
    "variant": (only("model.fp16.safetensors"), "model.fp16.safetensors", "rename it to model.safetensors"),
    "numbered": (only("model-00001-of-00002.safetensors"), "no model.safetensors.index.json", "fetch that too"),
    "adapter weights": (only("adapter_model.safetensors"), "an adapter, not a whole model", "merge it first"),
    "old adapter": (only("adapter_model.bin"), "an adapter, not a whole model", "merge it first"),
    "checkpoint": (only("global_step100"), "a training checkpoint", "save_pretrained"),
    "nothing": (only("README.md"), "neither model.safetensors nor model.safetensors.index.json", "fetch"),
    "link": (dangling("model.safetensors"), "/model.safetensors: is a link to ../../blobs/gone", "not there"),
    "config link": (dangling("config.json"), "/config.json: is a link to ../../blobs/gone", "not there"),
    "folder": (as_folder("model.safetensors"), "/model.safetensors: is a folder, not a file", "fetch"),
    "config folder": (as_folder("config.json"), "/config.json: is a folder, not a file", "fetch"),
    "lfs": (write_text("model.safetensors", POINTER), "/model.safetensors: is a git-lfs pointer", "`git lfs pull`"),
    "config lfs": (write_text("config.json", POINTER), "/config.json: is a git-lfs pointer", "`git lfs pull`"),
    "page": (write_text("model.safetensors", "<!DOCTYPE html>"), "is a web page", "fetch it again"),
    "pickle": (write_text("model.safetensors", "PK\3\4" + "x" * 99), "a PyTorch file under another name", "convert"),
    "empty": (write_text("model.safetensors", ""), "0 bytes, shorter than its own header", "fetch it again"),
    "config empty": (write_text("config.json", " \n"), "/config.json: is empty", "fetch"),
    "config deep": (write_text("config.json", "[" * 99999), "/config.json: not JSON", "fetch it again"),
    "config list": (write_text("config.json", "[]"), "a JSON object is needed"),
    "longer": (longer, "100 bytes after the last tensor", "damaged", "fetch it again"),
    "overlap": (offsets(lambda a, b: [a - 4, b - 4]), f"tensor {Q} overlaps", "damaged", "fetch it again"),
    "gap": (offsets(lambda a, b: [a + 4, b]), f"tensor {Q} leaves a gap after", "damaged", "fetch it again"),
    "backwards": (offsets(lambda a, b: [b, a]), "not a safetensors header", "fetch it again"),
    "float offsets": (offsets(lambda a, b: [float(a), b]), "not a safetensors header", "fetch it again"),
    "null type": (
        lambda folder: change_header(folder, lambda header: header | {Q: header[Q] | {"dtype": None}}),
        "not a safetensors header",
        "fetch it again",
    ),
    "null offsets": (offsets(lambda a, b: None), "not a safetensors header", "fetch it again"),
    "adapter": (
        write_text("adapter_config.json", json.dumps(LORA)),
        "an adapter next to whole weights",
        "merge it first",
    ),
    "adapter alone": (only("adapter_config.json", json.dumps(LORA).encode()), 'an adapter of "me/base"', "merge it"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_weights_are_named_for_what_they_are(copy, kind):
    damage, *words = FILES[kind]
    folder = copy()
    damage(folder)
    says(refusal(folder), *words)


def test_folders_that_are_no_models(tmp_path):
    def made(name: str, *files: str):
        for file in files or [""]:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(json.dumps(LORA)) if file else (tmp_path / name).mkdir()
        return tmp_path / name

    says(refusal(made("models--a--b", "snapshots/abc123/config.json", "refs/main")), "/models--a--b/snapshots/abc123")
    says(refusal(made("many", "one/config.json", "two/config.json")), "not a model, but it has folders", "/many/two")
    says(refusal(made("adapter", "adapter_config.json")), 'an adapter of "me/base"', "merge it first")
    says(refusal(made("gguf", "model-Q4.gguf")), "GGUF weights (model-Q4.gguf)", "unquantized")
    says(refusal(made("meta", "params.json", "consolidated.00.pth")), "Meta's own files", "Hugging Face format")
    says(refusal(made("stage", "_METADATA")), "a stage's model", "export")
    says(refusal(made("empty")), "/config.json: the file is missing")
    says(refusal(made("empty2", "x") / "x"), ": not a folder; give")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("meta-llama/Llama-3.2-1B", "hf download meta-llama/Llama-3.2-1B"),
        ("~/x", "no shell has replaced '~'"),
        ("a", "no such"),
    ],
)
def test_a_path_to_nothing(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    says(refusal(path), "no such folder", words)


def test_an_empty_path():
    with pytest.raises(InputError, match="the empty path: not a folder"):
        check_folder("")


# --- The index


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index["weight_map"])))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: {"weight_map": files | {HEAD: None}}, ("has null as the file of tensor lm_head.weight",)),
        (lambda files: {"weight_map": files | {HEAD: 3}}, ("has 3 as the file",)),
        (lambda files: {"weight_map": files | {HEAD: ""}}, ('has "" as the file',)),
        (lambda files: {"weight_map": files | {HEAD: "../plain/model.safetensors"}}, ("a file in the folder",)),
        (lambda files: {"weight_map": {}}, ("'weight_map' is missing or empty",)),
        (lambda files: {"weight_map": list(files)}, ("'weight_map' is missing or empty",)),
        (lambda files: {}, ("'weight_map' is missing or empty",)),
        (lambda files: [], ("a JSON object is needed",)),
    ],
)
def test_an_index_that_is_none(copy, change, words):
    folder = copy("shards")
    edit_index(folder, change)
    says(refusal(folder), "model.safetensors.index.json", *words)


def test_an_index_with_sub_folders_and_entries_that_nobody_needs(copy):
    folder = copy("shards")
    want = load_hf(folder)[1]
    first = sorted(path.name for path in folder.glob("*.safetensors"))[0]
    (folder / "sub").mkdir()
    (folder / first).rename(folder / "sub" / first)
    moved = {first: f"sub/{first}"}
    edit_index(folder, lambda files: {"weight_map": {name: moved.get(file, file) for name, file in files.items()}})
    assert_same(want, load_hf(folder)[1])
    edit_index(folder, lambda files: {"weight_map": files | {"not.there": f"sub/{first}"}})
    assert_same(want, load_hf(folder)[1])


def test_a_tensor_that_only_the_index_has(copy):
    folder = copy("shards")
    header_of = {path: read_header(path) for path in folder.glob("*.safetensors")}
    path, (header, data) = next((path, both) for path, both in header_of.items() if Q in both[0])
    write_header(path, {name.replace("q_proj", "v_head.x"): info for name, info in header.items()}, data)
    says(refusal(folder), f"tensor {Q} is missing", f"index.json says that it is in {path.name}", "fetch both again")


# --- Rights


@pytest.fixture
def ordinary_user():
    """No file mode stops root, so for a test root is somebody else."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "mode"), [("config.json", 0), ("model.safetensors", 0), (".", 0), (".", 0o444), (".", 0o111)]
)
def test_what_cannot_be_read_is_named(copy, name, mode, tmp_path, monkeypatch, request):
    folder = copy()
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    (folder / name).chmod(mode)
    request.getfixturevalue("ordinary_user")
    with pytest.raises(InputError) as error:
        check_folder("plain")
    says(str(error.value), "plain" if name == "." else name, "cannot be read (Permission denied)", "check its owner")
