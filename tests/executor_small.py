"""Calls on a small machine: `python executor_small.py COUNT WORKERS MEMORY_MB` prints one JSON object per call."""

import json
import sys

from executor_corner import honest

from reft_jax import executor


def main(count: int, workers: int, memory_mb: int) -> None:
    print(json.dumps(executor.start(workers, memory_mb)), flush=True)
    programs, answers = honest(count)
    for part in range(4):
        asked = [program + f"# {part}" for program in programs]  # no call sees a program twice
        results = executor.run_programs(asked, workers=workers, memory_mb=memory_mb, timeout_s=60)
        wrong = [result for result, answer in zip(results, answers, strict=True) if result[:2] != (answer, "ok")]
        held = sum(zygote.spares for zygote in executor.pool._state.zygotes)
        said = {"wrong": wrong[:3], "count": len(results), "spares": held, "retries": executor.counts()["retries"]}
        print(json.dumps(said), flush=True)
    executor.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
