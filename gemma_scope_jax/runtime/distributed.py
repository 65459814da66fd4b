"""Many hosts as one program: all compute, the first one writes and speaks.

All but `is_preempted` may be called by a program of one process, for which they do nothing or the obvious.
"""

import dataclasses
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax._src import clusters
from jax.experimental import multihost_utils

from gemma_scope_jax.runtime import signals
from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say

_SAY_AFTER, _SAY_EVERY = 5, 30  # Seconds of waiting for others.


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of how many processes this one is, and where the first one listens (HOST:PORT)."""

    address: str | None
    count: int
    index: int
    devices: list[int] | None  # Of this host's GPUs those it uses; empty: all; None: as JAX does.


ALONE = Place(None, 1, 0, None)


def initialize(
    *, heartbeat_timeout_seconds: int = 30, join_timeout_seconds: int = 300, saves_together: bool = False
) -> None:
    """Joins the processes of the other hosts, if there are any; to be called before anything looks at a device.

    Cloud TPU, GKE and Slurm tell who they are. Elsewhere JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID do; JAX_NUM_PROCESSES=1 runs alone wherever it is.

    Args:
      heartbeat_timeout_seconds: when another has not been heard of for so long, this process ends.
      join_timeout_seconds: how long it waits for the others at the start.
      saves_together: whether SIGTERM is JAX's, for `is_preempted`; else it ends this process at once.

    Raises:
      ValueError: it is not told who the others are, or they do not come in time.
    """
    place = ALONE
    failed: list[Exception] = []

    def join() -> None:
        nonlocal place
        try:
            place = place_in(os.environ)
            if place.count > 1:
                _connect(place, heartbeat_timeout_seconds, join_timeout_seconds)
        except Exception as error:  # Of any kind: none may go on as if it were alone.
            failed.append(error)

    # On a thread: JAX waits in C++, deaf to all, and then ends the process with a trace of its stack.
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    started, wait = time.monotonic(), _SAY_AFTER
    while thread.is_alive():
        left = started + join_timeout_seconds - time.monotonic()
        if left <= 0:
            raise ConfigError(
                f"waited {join_timeout_seconds} s (hosts.join_timeout_seconds) {_waited_for(place)}; start "
                "the same command for all of them, or set JAX_NUM_PROCESSES=1 to run alone"
            )
        thread.join(min(wait, left))
        if thread.is_alive() and left > wait:
            say(f"Waiting {_waited_for(place)}: {time.monotonic() - started:.0f} s so far.")
        wait = _SAY_EVERY
    if failed:
        raise failed[0]
    if place.count > 1 and saves_together:
        signals.pass_on_hangups()
    else:
        signals.answer_again()
    if place.count > 1 and not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")


def place_in(environment: Mapping[str, str]) -> Place:
    """What the environment, or the cluster it is of, says of this process.

    Raises:
      ValueError: some of the three variables are missing, or say what cannot be; or the cluster does not answer.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if environment.get("JAX_NUM_PROCESSES") == "1":
        return ALONE
    given = [name for name in names if name in environment]
    if given and len(given) < len(names):
        raise ConfigError(f"of {', '.join(names)} only {', '.join(given)} is set; set all three, or none")
    address = count = index = None
    if given:
        address, count, index = environment[names[0]], *(_number(environment, name) for name in names[1:])
        if not re.fullmatch(r".+:\d+", address):
            raise ConfigError(
                f"{names[0]} is {printable(address)!r}; it must be HOST:PORT of the first process"
            )
        if not 0 <= index < count:
            raise ConfigError(
                f"{names[2]} is {index}; of {names[1]} {count} it must be from 0 to {count - 1}"
            )
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, count, index, gpus_of(environment), None, 60
        )
    except Exception as error:  # A cluster's own variables, its network, or a package it needs.
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise ConfigError(
            f"this cluster does not say who the other processes are ({reason}); set {', '.join(names)}, or "
            "JAX_NUM_PROCESSES=1 to run alone"
        ) from error
    return ALONE if found[0] is None or found[1] == 1 else Place(*found)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not re.fullmatch(r"\s*\d{1,9}\s*", value):
        raise ConfigError(f"{name} is {printable(value)!r}, expected a whole number")
    return int(value)


def gpus_of(environment: Mapping[str, str]) -> list[int] | None:
    """Which of a host's GPUs are this process's: an equal share each; empty for all; None to leave it to JAX.

    JAX gives each task of Slurm and Open MPI the one GPU of its local number, so a task alone on its host would use
    one and leave the others idle.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    tasks = _tasks_on_this_host(environment)
    is_bound = (
        "SLURM_GPUS_PER_TASK" in environment
        or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
        or not environment.get("SLURM_GPU_BIND", "none").endswith("none")
    )
    if tasks == 1 or is_bound:
        return []  # Alone, or Slurm lets each task see its own only.
    local = environment.get("SLURM_LOCALID", environment.get("OMPI_COMM_WORLD_LOCAL_RANK", ""))
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
    count = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE", 0))
    if not tasks or not local:
        return None
    if count < tasks:
        return [] if visible else None
    share = count // tasks
    return list(range(int(local) * share, (int(local) + 1) * share))


def _tasks_on_this_host(environment: Mapping[str, str]) -> int | None:
    if local_size := environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(local_size)
    by_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # Such as 2(x3),1.
    tasks = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", by_node)
        for _ in range(int(times or 1))
    ]
    node = int(environment.get("SLURM_NODEID", 0))
    if node < len(tasks):
        return tasks[node]
    nodes = environment.get("SLURM_STEP_NUM_NODES")
    return 1 if nodes and nodes == environment.get("SLURM_NTASKS") else None


def _connect(place: Place, heartbeat_timeout_seconds: int, join_timeout_seconds: int) -> None:
    port = int(place.address.rsplit(":", 1)[1])
    if place.index == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        with (
            socket.socket() as trial
        ):  # gRPC shares a port with another job's and waits for those who ask there.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(
                    f"cannot listen on port {port} for the other processes: {reason}; name another in "
                    "JAX_COORDINATOR_ADDRESS, or on a cluster in JAX_COORDINATOR_PORT, for all of them"
                ) from error
    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            place.devices,
            initialization_timeout=join_timeout_seconds + 60,  # `initialize` says it first.
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )
    except Exception as error:  # Of JAX, gRPC or a variable that JAX reads itself.
        reason = printable(" ".join(str(error).split()))
        raise ConfigError(f"cannot join the other processes at {place.address}: {reason}") from error


def _waited_for(place: Place) -> str:
    """Whom this process waits for, and what is seen of them."""
    if place.count == 1:
        return "for this cluster to say who the other processes are"
    this = f"as process {place.index} of {place.count} (from 0)"
    if place.index == 0:
        others = ", ".join(map(str, range(1, min(place.count, 8)))) + ("…" if place.count > 8 else "")
        nodes = os.environ.get("SLURM_STEP_NODELIST")
        on = f" on {printable(nodes)}" if nodes else ""
        return f"{this} at {place.address} for process {others}{on} to connect"
    host, port = place.address.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            seen = "it answers, so another one is missing"
    except socket.gaierror:
        seen = f"the name {host} is not known here"
    except (OSError, OverflowError, UnicodeError) as error:
        seen = f"it does not answer: {getattr(error, 'strerror', None) or error}"
    return f"{this} for process 0 at {place.address} ({seen})"


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


def all_agree(value: bool) -> bool:
    """Whether it is true on every host; to be called by all of them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def is_preempted(step: int) -> bool:
    """Whether a host has had a SIGTERM and all are to save after this step: the same step on every host.

    Of JAX's preemption service, which there is with more than one process. To be called after every step.
    """
    return multihost_utils.reached_preemption_sync_point(step)
