"""The command `plan`: does a run fit a pod, and how fast can it be? plan/table.py prints the answer."""

import os
from types import SimpleNamespace

from reft_jax.types import InputError

# The TPU compiler needs no TPU, but would ask a TPU machine's server for one, and would let no other process compile.
# Without the last two it warns.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def run(config, file: str, **values) -> bool:
    """Prints the plan of the run that `file` configures, as the flags `values` say; whether it fits. InputError."""
    if len(values["topology"]) > 1 and not values["search"] and not values["grow"]:
        raise InputError("--topology: several pods need --search or --grow; write --topology=v5e:4x8 for one")
    if values["grow"] and (values["search"] or values["json"]):
        raise InputError("--grow: makes one table of the pods of --topology; leave out --search and --json")
    os.environ |= ENVIRONMENT
    from reft_jax.plan.table import run_plan  # imports JAX, which reads the environment then

    return run_plan(config, SimpleNamespace(config=file, **values))
