"""What chips can do: FLOPs, memory and bandwidth by kind, and the memory of the devices at hand."""

import dataclasses
import os
import pathlib

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind has, by Google's documentation."""

    flops: float  # of bfloat16, in a second
    memory: float  # bytes
    memory_bandwidth: float  # bytes in a second
    link_bandwidth: float  # bytes in a second, of one link to a neighbour, one way


CHIPS = {
    "v4": Chip(275e12, 32e9, 1.2e12, 45e9),
    "v5e": Chip(197e12, 16e9, 0.819e12, 45e9),
    "v5p": Chip(459e12, 95e9, 2.765e12, 90e9),
    "v6e": Chip(918e12, 32e9, 1.64e12, 90e9),
    # A chip is two devices, which share its links.
    "tpu7x": Chip(2307e12 / 2, 192e9 / 2, 7.37e12 / 2, 100e9 / 2),
}

# Multiplications in bfloat16 that one in float32 takes.
PASSES = {"default": 1, "high": 3, "highest": 6}

# What JAX calls their devices.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(device: jax.Device) -> Chip | None:
    """What a device has; None if it is not among `CHIPS`."""
    return CHIPS.get(_KINDS.get(device.device_kind, ""))


# Of control groups, version 2 and 1.
_CONTAINER_LIMITS = tuple(
    map(pathlib.Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"))
)


def memory_of(device: jax.Device) -> int:
    """Bytes that a device has; a CPU's share of the machine's, or of the container's."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        if path.exists() and (limit := path.read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits) // jax.local_device_count()
