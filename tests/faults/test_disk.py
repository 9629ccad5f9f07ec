"""The disk becomes full while a step is saved: a clear message, and the older step is used."""

import shutil
import subprocess

import starts


def test_the_disk_fills_up_during_a_save(reference, cache, tmp_path):
    """A disk of 64 MiB in a new mount namespace; where that is not allowed, Orbax gets an error as if it were full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=64m none {disk} && exec "$@"', "sh"]
    real = shutil.which("unshare") and not subprocess.run([*mount, "true"], capture_output=True).returncode
    starts.before_ppo(reference, tmp_path / "ready")
    # The second save of the run: step 3 is whole by then.
    full = starts.command("reft", disk / "run", cache, at=("full disk" if real else "no space", 2, "SIGKILL"))
    again = starts.command("reft", disk / "run", cache)
    script = f"""
        cp -r {tmp_path / "ready"} {disk / "run"}
        "$@"
        echo "exit code $?" >&2
        rm -f {disk / "run" / "ballast"}
        exec {" ".join(map(str, again))}
    """
    shell = [*(mount if real else []), "sh", "-c", script, "sh", *full]
    done = subprocess.run(
        shell, cwd=starts.ROOT, env=starts.environment(), capture_output=True, text=True, timeout=starts.LIMIT_S
    )
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "checkpoints/6 could not be saved" in error and "step 3 is whole and will be used; make room" in error
    assert "exit code 4\n" in done.stderr
    assert done.returncode == 0, done.stderr
    assert "reft: resuming after 3\n" in done.stdout
    if not real:
        assert starts.lines(disk / "run", "reft") == starts.lines(reference, "reft")
