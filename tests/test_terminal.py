"""Pipes whose reader has ended, terminals without some characters, Ctrl-C, and `>` to a full disk."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reft_jax import __main__
from reft_jax.terminal import Stream

ROOT = Path(__file__).resolve().parents[1]
MANY = "import sys; print(1, flush=True); sys.stdin.readline(); [print('x' * 99, file=sys.{}) for _ in range(9999)]"


def script(lines: str, **kwargs) -> subprocess.Popen:
    """A program that prints as a command does, on its own streams."""
    command = f"""
import sys
from reft_jax import __main__
__main__.run_command = lambda argv: exec(argv[0])
sys.argv = ["reft", {lines!r}]
__main__.main()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    return subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, text=True, **pipes)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_goes_on_when_nobody_reads_it(stream, tmp_path):
    """As after `… | head -1`, and when what took the progress lines has ended."""
    done = tmp_path / "done"
    process = script(MANY.format(stream) + f"; open({str(done)!r}, 'w')")
    assert process.stdout.readline() == "1\n"
    getattr(process, stream).close()
    setattr(process, stream, None)
    said = process.communicate("\n", timeout=60)
    assert process.returncode == 0 and done.exists()
    assert not any(text for text in said if text), said


def test_a_stream_whose_reader_is_gone_takes_everything():
    reader, writer = os.pipe()
    os.close(reader)
    with Stream(open(writer, "wb"), encoding="utf-8", line_buffering=True) as stream:
        for _ in range(3):
            assert stream.write("x" * 99_999 + "\n") == 100_000
            stream.flush()


def test_a_command_line_into_a_pipe_that_is_closed():
    process = subprocess.Popen(
        [sys.executable, "-m", "reft_jax", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdout = None
    assert process.communicate() == (None, b"") and process.returncode == 0


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "? ?\n"), ("latin-1", "? °\n"), ("utf-8", "– °\n")])
def test_a_character_that_a_terminal_lacks_is_replaced(encoding, shown):
    process = script(
        "print('– °')", env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, encoding=encoding
    )
    assert process.communicate(timeout=60) == (shown, "")
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_table_that_does_not_fit_on_the_disk_is_an_error():
    for lines in ("print('a table')", "print('x' * 99999)"):
        with open("/dev/full", "w") as full:
            process = script(lines, stdout=full)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 4
        assert said.startswith("error: standard output could not be written (No space left") and said.count("\n") == 1


SWALLOWED = """
import atexit, threading, time
print("ready", flush=True)
threading.Thread(target=time.sleep, args=[60]).start()
try: time.sleep(60)
except KeyboardInterrupt: pass
time.sleep(60)
"""


@pytest.mark.parametrize("lines", ["import time; print('ready', flush=True); time.sleep(60)", SWALLOWED])
def test_ctrl_c_is_one_line_and_the_end(lines):
    """Also where something swallows the exception, or a thread still works."""
    process = script(lines)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "stopped by SIGINT\n")
    assert process.returncode == 128 + signal.SIGINT


def test_ctrl_c_in_a_shells_background_is_not_for_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited; a preexec_fn would fork, of which JAX warns
    try:
        process = script("import os, signal; os.kill(os.getpid(), signal.SIGINT); print('goes on')")
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.communicate(timeout=30) == ("goes on\n", "")


def test_ctrl_c_while_programs_run(tmp_path):
    """In a command without a work directory; nothing is written, and nobody is left."""
    row = {"item_id": "svamp_0", "question": "How many?", "answer_value": "5"}
    row["answer_cot"] = "def solution():\n    while True:\n        pass"
    (tmp_path / "data.json").write_text(json.dumps([row]))
    argv = ["convert", "svamp", f"--in={tmp_path / 'data.json'}", f"--out_dir={tmp_path / 'out'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reft_jax", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline().startswith("programs run with")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert said == "stopped by SIGINT\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/data/x.json"), "/data/x.json could not be written (No space left"),
        (PermissionError(13, "Permission denied", "/data/y"), "/data/y could not be written (Permission denied)"),
        (OSError(30, "Read-only file system", "/data/z"), "/data/z could not be written (Read-only file system)"),
    ],
)
def test_what_the_disk_refuses_ends_with_code_4_and_one_line(monkeypatch, capsys, error, says):
    def refused(argv):
        raise error

    monkeypatch.setattr(__main__, "run_command", refused)
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 4
    said = capsys.readouterr().err
    assert said.startswith(f"error: {says}") and said.count("\n") == 1
