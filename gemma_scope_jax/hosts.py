"""Many hosts as one program: all compute, the first one writes and speaks.

All but `is_preempted` may be called by a program of one process, for which they do nothing or the obvious.
"""

import os
import sys

import jax
from jax.experimental import multihost_utils


def initialize(heartbeat_timeout_seconds: int) -> None:
    """Joins the processes of the other hosts, if there are any; to be called before anything looks at a device.

    Cloud TPU, GKE and Slurm tell who they are. Elsewhere JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Args:
      heartbeat_timeout_seconds: when one has not been heard of for so long, all others end.

    Raises:
      ValueError: some of the three variables are missing.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        raise ValueError(f"of {', '.join(names)} only {', '.join(given)} is set; set all three, or none")
    count, index = (int(os.environ[name]) if given else None for name in names[1:])
    try:
        jax.distributed.initialize(
            num_processes=count, process_id=index, heartbeat_timeout_seconds=heartbeat_timeout_seconds
        )
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        return  # A machine on its own.
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Goes on when every process has come to this place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def fetch(tree: object) -> object:
    """Arrays whole and on the host, of every process; to be called by all of them.

    Those that lie on a process' own devices, as what each opens for itself does, are its own.
    """

    def whole(leaf: object) -> object:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def is_preempted(step: int) -> bool:
    """Whether a host has had a SIGTERM and all are to save after this step: the same step on every host.

    Of JAX's preemption service, which there is with more than one process. To be called after every step.
    """
    return multihost_utils.reached_preemption_sync_point(step)
