"""The private parts of JAX that this package uses, all in this file, each with its reason.

A new JAX release may move them without notice. The names, and the methods of the client that hosts.py calls, are the
same in JAX 0.10.2 and 0.12.0; test_hosts.py fails where they are not.
"""

from typing import Any

from jax._src import cloud_tpu_init, distributed


def coordination() -> tuple[Any, int, int]:
    """Returns (client of the coordination service, number of this process, number of processes).

    Call it after `jax.distributed.initialize`. Private, because JAX offers no public way to store and read short texts
    in the coordination service, and `jax.process_index()` would initialize the devices. hosts.py calls the client's
    `key_value_set`, `key_value_delete`, `key_value_dir_get` and `blocking_key_value_get`.
    """
    state = distributed.global_state
    return state.client, state.process_id, state.num_processes


def on_tpu_vm() -> bool:
    """Whether JAX found at its import that this machine is a Cloud TPU VM with libtpu.

    Private, because the public ways to find TPUs initialize the devices, which must come after
    `jax.distributed.initialize`.
    """
    return cloud_tpu_init.running_in_cloud_tpu_vm
