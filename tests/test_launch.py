"""The launch scripts: checked by shellcheck, and run with fake versions of gcloud, srun and `reft`."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reft_jax.types import InputError

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if SHELLCHECK is None:
        pytest.skip("no shellcheck: pip install -e .[test]")
    done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def stand_in(folder: Path, name: str, script: str) -> Path:
    """A program of that name in `folder`."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def environment(folder: Path, **more) -> dict[str, str]:
    """Where the stand-ins of `folder` come first."""
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "WAIT_S": "0"} | more


def run(script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([LAUNCH / script, *arguments], env=env, capture_output=True, text=True, timeout=60)


FAILS = """
[[ "$REFT_WAIT" == 1 ]] || exit 99
echo "$@" >> "$RECORD"
(( $(wc -l < "$RECORD") > FAILURES )) || exit "$CODE"  # so often, with that code
"""


@pytest.mark.parametrize("script", ["host.sh", "slurm.sh"])
@pytest.mark.parametrize(
    ("failures", "code", "starts", "ends"), [(2, 1, 3, 0), (0, 1, 1, 0), (9, 2, 1, 2), (9, 134, 4, 134)]
)
def test_a_run_that_fails_is_started_again_but_not_for_wrong_input(tmp_path, script, failures, code, starts, ends):
    program = stand_in(tmp_path, "srun", FAILS)
    record = {"RECORD": str(tmp_path / "starts"), "FAILURES": str(failures), "CODE": str(code), "RESTARTS": "3"}
    env = environment(tmp_path, PYTHON=str(program), SLURM_SUBMIT_DIR=str(tmp_path), **record)
    done = run(script, "sft", "--config=a b", env=env)
    lines = (tmp_path / "starts").read_text().splitlines()
    assert (done.returncode, len(lines)) == (ends, starts), done.stderr
    assert all(line.endswith("-m reft_jax sft --config=a b") for line in lines)


def test_a_host_that_is_asked_to_stop_lets_the_run_end_and_starts_no_other(tmp_path):
    program = stand_in(tmp_path, "python", 'trap "sleep 0.3; exit 7" TERM\necho begun\nsleep 60 &\nwait $!\nexit 1')
    process = subprocess.Popen(
        [LAUNCH / "host.sh", "sft"], env=environment(tmp_path, PYTHON=str(program)), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 7
    process.stdout.close()


def test_tpu_vm_runs_the_command_on_every_host_as_it_was_typed(tmp_path):
    """The stand-in for gcloud runs what is to be run on the hosts, in a home where host.sh says what it was given."""
    home = tmp_path / "home" / "reft_jax" / "launch"
    home.mkdir(parents=True)
    stand_in(home, "host.sh", 'printf "%s\\n" "$@"')
    gcloud = 'echo "$@" >> "$RECORD"; cd "$HOSTS_HOME"; for last; do :; done; bash -c "${last#--command=}"'
    stand_in(tmp_path, "gcloud", gcloud)
    record = {"RECORD": str(tmp_path / "calls"), "HOSTS_HOME": str(tmp_path / "home")}
    env = environment(tmp_path, TPU="pod", ZONE="here", **record)
    asked = ["pipeline", "--config=c.py", '--config.name=CodeLlama\'s "7B" $run']
    done = run("tpu_vm.sh", "start", *asked, env=env)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("compute tpus tpu-vm ssh pod --zone=here --worker=all --command=")
    log, deadline = tmp_path / "home" / "reft_jax" / "host.log", time.monotonic() + 30
    while (not log.exists() or len(log.read_text().splitlines()) < 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert log.read_text().splitlines() == asked
    assert (log.parent / "host.pid").read_text().strip().isdigit()


def test_tpu_vm_dry_run_prints_whole_commands_and_calls_nothing(tmp_path):
    stand_in(tmp_path, "gcloud", 'touch "$RECORD"')
    record = str(tmp_path / "called")
    env = environment(tmp_path, TPU="pod", ZONE="here", SHARE="10.0.0.2:/reft", DRY_RUN="1", RECORD=record)
    lines = []
    for arguments in (["setup"], ["start", "sft"], ["follow"], ["stop"]):
        done = run("tpu_vm.sh", *arguments, env=env)
        assert done.returncode == 0, done.stderr
        lines += done.stdout.splitlines()
    assert len(lines) == 9 and not os.path.exists(record)
    assert shlex.split(lines[0])[0] == "tar"
    for line in lines[1:]:
        words = shlex.split(line)
        assert words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] and words[4] in ("ssh", "scp")
        for word in words:
            if word.startswith("--command="):
                checked = subprocess.run(["bash", "-n", "-c", word.removeprefix("--command=")], capture_output=True)
                assert checked.returncode == 0, checked.stderr
    assert run("tpu_vm.sh", "setup", env=env | {"TPU": ""}).returncode == 2
    in_a_bucket = run("tpu_vm.sh", "setup", env=env | {"SHARE": ""})
    assert in_a_bucket.returncode == 0 and len(in_a_bucket.stdout.splitlines()) == 4
    assert "/mnt/reft" in "".join(lines) and "/mnt/reft" not in in_a_bucket.stdout


def test_tpu_vm_copies_the_checkout_without_hidden_folders(tmp_path):
    stand_in(tmp_path, "gcloud", 'for word in "$@"; do [[ ! -f "$word" ]] || tar -tzf "$word" >> "$RECORD"; done')
    record = tmp_path / "packed"
    done = run("tpu_vm.sh", "setup", env=environment(tmp_path, TPU="pod", ZONE="here", RECORD=str(record)))
    assert done.returncode == 0, done.stderr
    packed = set(record.read_text().split())
    assert {"./launch/venv.sh", "./launch/host.sh", "./pyproject.toml", "./reft_jax/__main__.py"} <= packed
    assert not [name for name in packed if name.startswith("./.") and name != "./"]


def test_the_manifest_fills_its_slice_and_runs_what_is_there():
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    [job] = manifest["spec"]["replicatedJobs"]
    hosts, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert hosts["completions"] == hosts["parallelism"] == rows * columns // chips == 8
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0 and hosts["backoffLimit"] == 0
    [ends], [fails] = manifest["spec"]["failurePolicy"]["rules"], hosts["podFailurePolicy"]["rules"]
    assert ends == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert fails["action"] == "FailJob" and fails["onExitCodes"]["containerName"] == container["name"]
    assert fails["onExitCodes"]["values"] == [InputError.exit_code]
    assert {"name": "REFT_WAIT", "value": "1"} in container["env"]
    [script] = container["args"]
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
    for name in re.findall(r"\b(?:launch|configs)/\w+\.\w+", script):
        assert (LAUNCH.parent / name).exists(), name
    assert "volumes" not in pod and "volumeMounts" not in container


def test_a_pod_of_the_manifest_needs_only_a_repository_and_a_bucket(tmp_path):
    """Its script, in an empty folder, with stand-ins for git and for what a clone holds; then a commit that is gone."""
    yaml = pytest.importorskip("yaml")
    [job] = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    makes = 'mkdir -p launch .venv/bin; cp "$STAND_INS/venv.sh" launch; cp "$STAND_INS/python" .venv/bin'
    stand_in(tmp_path, "git", f'echo "git $*" >> "$RECORD"; [[ "$*" != *gone* ]] || exit 128; {makes}')
    stand_in(tmp_path, "venv.sh", 'echo "$0 $*" >> "$RECORD"')
    stand_in(tmp_path, "python", 'printf "%s\\n" "$@" >> "$RECORD"')
    record = {"RECORD": str(tmp_path / "record"), "STAND_INS": str(tmp_path)}
    env = environment(tmp_path, **{one["name"]: one["value"] for one in container["env"]}, **record)
    for commit, code in (("abc", 0), ("gone", 128)):
        here = tmp_path / commit
        here.mkdir()
        words = [*container["command"], *container["args"]]
        done = subprocess.run(words, cwd=here, env=env | {"COMMIT": commit, "BUCKET": "gs://b"}, timeout=60)
        assert done.returncode == code
        cloned, chosen, *rest = (tmp_path / "record").read_text().splitlines()
        assert cloned == f"git clone --quiet {env['REPOSITORY']} ." and chosen == f"git checkout --quiet {commit}"
        (tmp_path / "record").unlink()
        if code:
            assert not rest
            continue
        assert rest[:4] == ["launch/venv.sh tpu", "-m", "reft_jax", "pipeline"]
        paths = [word.partition("=")[2] for word in rest[5:]]
        assert len(paths) == 4 and all(path.startswith("gs://b/") for path in paths)


@pytest.mark.parametrize(("place", "extras"), [("", "page"), ("gs://bucket/runs/q", "page,gcs")])
def test_the_quickstart_installs_what_its_work_directory_needs(tmp_path, place, extras):
    """A fresh clone: the script alone, beside a stand-in for venv.sh, which makes a Python."""
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "quickstart.sh", tmp_path / "launch")
    record = {"RECORD": str(tmp_path / "record"), "WORKDIR": place}
    makes = 'echo "$0 $*" >> "$RECORD"; mkdir -p .venv/bin; cp launch/python .venv/bin'
    stand_in(tmp_path / "launch", "venv.sh", makes)
    stand_in(tmp_path / "launch", "python", 'echo "$0 $*" >> "$RECORD"')
    words = [tmp_path / "launch" / "quickstart.sh", "--config.seed=7"]
    done = subprocess.run(words, env=environment(tmp_path, **record), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    installed, ran = (tmp_path / "record").read_text().splitlines()
    assert installed == f"launch/venv.sh {extras}"
    assert ran.endswith(
        f"pipeline --config=configs/quickstart.py --workdir={place or 'runs/quickstart'} --config.seed=7"
    )


def test_a_python_that_will_do_is_found(tmp_path):
    """Here there is one, for the tests run with it."""
    (tmp_path / "python3").symlink_to(sys.executable)
    found = subprocess.run(
        [LAUNCH / "python.sh"], env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    asked = [found.stdout.strip(), "-c", "import sys; print(sys.version_info[:2] >= (3, 11))"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "True\n"


def test_the_newest_python_is_taken_and_only_what_is_asked_for(tmp_path):
    for version in ("3.11", "3.12", "3.13"):
        stand_in(tmp_path, f"python{version}", f"echo {version}")
    env = environment(tmp_path, PYENV_ROOT=str(tmp_path))
    assert run("python.sh", env=env).stdout == f"{tmp_path}/python3.13\n"
    assert run("python.sh", "3.12", "3.11", env=env).stdout == f"{tmp_path}/python3.12\n"
    missing = run("python.sh", "3.99", env=env)
    assert (missing.returncode, missing.stdout) == (1, "") and "no Python 3.99 here" in missing.stderr


@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize(("version", "pins"), [("3.11", "requirements.txt"), ("3.13", "requirements-newest.txt")])
def test_a_venv_gets_the_pins_of_its_python(tmp_path, version, pins, installer):
    """The stand-ins for its Python and for uv record what they are asked to install."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    asked = f'[[ "$*" == *version_info* ]] && echo {version} || echo "${{0##*/}} $*" >> "$RECORD"'
    stand_in(tmp_path / "venv" / "bin", "python", asked)
    if installer == "uv":
        stand_in(tmp_path, "uv", asked)
    elif shutil.which("uv"):
        pytest.skip("uv is on PATH, so pip is not used")
    env = environment(tmp_path, VENV=str(tmp_path / "venv"), RECORD=str(tmp_path / "record"))
    env.pop("PYTHON", None)
    done = run("venv.sh", "test", env=env)
    assert done.returncode == 0, done.stderr
    recorded = (tmp_path / "record").read_text()
    last = recorded.splitlines()[-1]
    assert last.startswith("uv pip install" if installer == "uv" else "python -m pip install")
    assert last.endswith(f"-r {pins} -e .[test]")
    assert run("venv.sh", "test", env=env).returncode == 0
    assert (tmp_path / "record").read_text() == recorded  # it was done: nothing is installed again
