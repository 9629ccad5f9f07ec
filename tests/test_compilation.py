"""What XLA compiles is kept and counted: for the next work directory, too."""

import json
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
from faults.starts import CONFIG, LIMIT_S, ROOT, environment

from reft_jax.parallel import compilation

# A command that prints as its last line how often each of JAX's events happened.
COUNTED = """
import json
from collections import Counter
from reft_jax import __main__

events, run_row = Counter(), __main__.run_row

def counted(*args):  # `main` has set by now what must be set before the first import of JAX
    import jax
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.update([event]))
    return run_row(*args)

__main__.run_row = counted
__main__.main()
print(json.dumps(events))
"""
READ = "/jax/compilation_cache/cache_hits"


def test_a_second_work_directory_compiles_nothing(tmp_path, monkeypatch):
    """SFT of the toy with its evaluation and saves, in two work directories with one folder of compiled functions."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name)  # they would come before the run's own choice
    kept, found = tmp_path / "compiled", []
    settings = [f"--config.{one}" for one in (*CONFIG, f"compiled={kept}")]
    for name in ("first", "second"):
        words = ["sft", f"--config={ROOT / 'configs/quickstart.py'}", f"--workdir={tmp_path / name}", *settings]
        done = subprocess.run(
            [sys.executable, "-c", COUNTED, *words], env=environment(), capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stderr
        events = Counter(json.loads(done.stdout.splitlines()[-1]))
        files = {path.name for path in kept.glob("*-cache")}
        found.append((events[compilation.COMPILE], events[READ], files))
        assert not (tmp_path / name / "compiled").exists()
    (needed, read, files), second = found
    assert needed > 20 and read < needed / 2
    assert second == (needed, needed, files)


def test_compiled_functions_are_kept_in_the_folder_unless_jaxs_own_variable_names_another(tmp_path, monkeypatch):
    """In a bucket only the slow ones, wherever the work directory is: each read of a bucket is a request."""
    told, bucket = {}, "gs://bucket/run"
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    for theirs, ours, seconds in ((tmp_path, bucket, 0.0), (bucket, tmp_path, 0.5)):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(theirs))
        compilation.keep_compiled(ours)
        assert told == {"jax_persistent_cache_min_compile_time_secs": seconds}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    for ours, seconds in ((tmp_path, 0.0), (bucket, 0.5)):
        compilation.keep_compiled(ours)
        assert told["jax_compilation_cache_dir"] == str(ours)
        assert told["jax_persistent_cache_min_compile_time_secs"] == seconds


def test_what_is_compiled_is_counted_with_its_seconds():
    before, seconds = compilation.compiles(), compilation.compile_seconds()
    jax.jit(lambda x: jax.numpy.sin(x) + 0.12345)(np.float32(1))
    assert compilation.compiles() > before and 0 < compilation.compile_seconds() - seconds < 60
