"""Many hosts as one program: all of them compute, and the first one writes and prints.

All functions except `is_preempted` can also be called in a program of one process, where they do nothing or the
obvious.
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

_SAY_AFTER, _SAY_EVERY = 5, 30  # Seconds of waiting for other processes.


@dataclasses.dataclass(frozen=True)
class Place:
    """This process's index, the number of processes, and the address (HOST:PORT) of the first process."""

    address: str | None
    count: int
    index: int
    devices: list[int] | None  # The GPUs of this host that it uses; empty: all; None: JAX's default.


ALONE = Place(None, 1, 0, None)


def initialize(
    *, heartbeat_timeout_seconds: int = 30, join_timeout_seconds: int = 300, saves_together: bool = False
) -> None:
    """Joins the processes of the other hosts, if there are any. Must be called before anything uses a device.

    Cloud TPU, GKE and Slurm identify the processes. Elsewhere JAX_COORDINATOR_ADDRESS (HOST:PORT of the first
    process), JAX_NUM_PROCESSES and JAX_PROCESS_ID do. With JAX_NUM_PROCESSES=1 the process always runs alone.

    Args:
      heartbeat_timeout_seconds: this process ends after this many seconds without a sign of another process.
      join_timeout_seconds: the number of seconds to wait for the other processes at the start.
      saves_together: whether JAX handles SIGTERM, for `is_preempted`; otherwise SIGTERM ends this process at once.

    Raises:
      ValueError: if the other processes cannot be identified, or do not join in time.
    """
    place = ALONE
    failed: list[Exception] = []

    def join() -> None:
        nonlocal place
        try:
            place = place_in(os.environ)
            if place.count > 1:
                _connect(place, heartbeat_timeout_seconds, join_timeout_seconds)
        except Exception as error:  # Of any kind: no process may go on as if it were alone.
            failed.append(error)

    # On a thread: JAX waits in C++, where it ignores signals, and then ends the process with a stack trace.
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    started, wait = time.monotonic(), _SAY_AFTER
    while thread.is_alive():
        left = started + join_timeout_seconds - time.monotonic()
        if left <= 0:
            raise ConfigError(
                f"waited {join_timeout_seconds} s (hosts.join_timeout_seconds) {_waited_for(place)}; start "
                "the same command in every process, or set JAX_NUM_PROCESSES=1 to run alone"
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
    """The place of this process, from the environment or the cluster.

    Raises:
      ValueError: if only some of the three variables are set, one is invalid, or the cluster does not answer.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if environment.get("JAX_NUM_PROCESSES") == "1":
        return ALONE
    given = [name for name in names if name in environment]
    if given and len(given) < len(names):
        raise ConfigError(
            f"{', '.join(names)} belong together, but only {', '.join(given)} is set; set all three, or none"
        )
    address = count = index = None
    if given:
        address, count, index = environment[names[0]], *(_number(environment, name) for name in names[1:])
        if not re.fullmatch(r".+:\d+", address):
            raise ConfigError(
                f"{names[0]} is {printable(address)!r}; it must be HOST:PORT of the first process"
            )
        if not 0 <= index < count:
            raise ConfigError(
                f"{names[2]} is {index}; with {names[1]}={count} it must be from 0 to {count - 1}"
            )
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, count, index, gpus_of(environment), None, 60
        )
    except Exception as error:  # From the cluster's variables, its network, or a package it needs.
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise ConfigError(
            f"this cluster does not identify the other processes ({reason}); set {', '.join(names)}, or "
            "JAX_NUM_PROCESSES=1 to run alone"
        ) from error
    return ALONE if found[0] is None or found[1] == 1 else Place(*found)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not re.fullmatch(r"\s*\d{1,9}\s*", value):
        raise ConfigError(f"{name} is {printable(value)!r}, expected a whole number")
    return int(value)


def gpus_of(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of this host that this process uses: an equal share each; empty for all; None to leave it to JAX.

    JAX gives each task of Slurm and Open MPI only the GPU of its local number, so a task alone on its host would use
    one GPU and leave the others idle.
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
        return []  # Alone, or Slurm shows each task only its own GPUs.
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
        # gRPC would share a port with another job, and then wait for processes that connect to that job.
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(
                    f"cannot listen on port {port} for the other processes: {reason}; set another port in "
                    "JAX_COORDINATOR_ADDRESS, or on a cluster in JAX_COORDINATOR_PORT, for all processes"
                ) from error
    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            place.devices,
            initialization_timeout=join_timeout_seconds + 60,  # `initialize` times out first.
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        )
    except Exception as error:  # From JAX, gRPC or a variable that JAX reads.
        reason = printable(" ".join(str(error).split()))
        raise ConfigError(f"cannot join the other processes at {place.address}: {reason}") from error


def _waited_for(place: Place) -> str:
    """The processes that this one waits for, and what it can see of them."""
    if place.count == 1:
        return "for this cluster to identify the other processes"
    this = f"as process {place.index} of {place.count} (from 0)"
    if place.index == 0:
        others = ", ".join(map(str, range(1, min(place.count, 8)))) + ("…" if place.count > 8 else "")
        nodes = os.environ.get("SLURM_STEP_NODELIST")
        on = f" on {printable(nodes)}" if nodes else ""
        return f"{this} at {place.address} for process {others}{on} to connect"
    host, port = place.address.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            seen = "it answers, so another process is missing"
    except socket.gaierror:
        seen = f"the host name {host} is unknown here"
    except (OSError, OverflowError, UnicodeError) as error:
        seen = f"it does not answer: {getattr(error, 'strerror', None) or error}"
    return f"{this} for process 0 at {place.address} ({seen})"


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def fetch(tree: object) -> object:
    """The arrays, whole and on the host, in every process. All processes must call it.

    An array that is only on this process's devices is returned as this process has it.
    """

    def whole(leaf: object) -> object:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def all_agree(value: bool) -> bool:
    """Whether `value` is true on every host. All processes must call it."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def is_preempted(step: int) -> bool:
    """Whether all hosts must save after this step, because one received SIGTERM; the same step on every host.

    Uses JAX's preemption service, which exists only with more than one process. Must be called after every step.
    """
    return multihost_utils.reached_preemption_sync_point(step)
