"""FLOPs, memory and bandwidth of chips by kind, and the memory of the attached devices."""

import dataclasses
import os
import pathlib

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of one JAX device of a kind, from Google's documentation."""

    flops: float  # per second, in bfloat16
    memory: float  # bytes
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second, over one link to a neighbour, in one direction


CHIPS = {
    "v4": Chip(275e12, 32e9, 1.2e12, 45e9),
    "v5e": Chip(197e12, 16e9, 0.819e12, 45e9),
    "v5p": Chip(459e12, 95e9, 2.765e12, 90e9),
    "v6e": Chip(918e12, 32e9, 1.64e12, 90e9),
    # A chip is two devices, which share its links.
    "tpu7x": Chip(2307e12 / 2, 192e9 / 2, 7.37e12 / 2, 100e9 / 2),
}

# The bfloat16 multiplications for one float32 multiplication, by matmul precision.
PASSES = {"default": 1, "high": 3, "highest": 6}

# Chips by the `device_kind` of their JAX devices.
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
    """The figures of a device; None if its kind is not in `CHIPS`."""
    return CHIPS.get(_KINDS.get(device.device_kind, ""))


_CPUINFO = pathlib.Path("/proc/cpuinfo")
# The flags in it of x86 and ARM CPUs that multiply bfloat16 faster than float32.
_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}


def faster_dtype(device: jax.Device) -> str:
    """The dtype in which a device multiplies faster; for a CPU, by its features and not by a timing."""
    if device.platform != "cpu":
        return "bfloat16"
    features = _CPUINFO.read_text().split() if _CPUINFO.exists() else []
    return "float32" if _BFLOAT16_FLAGS.isdisjoint(features) else "bfloat16"


# The memory limits of control groups, versions 2 and 1.
_CONTAINER_LIMITS = tuple(
    map(pathlib.Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"))
)


def memory_of(device: jax.Device) -> int:
    """The memory of a device in bytes; for a CPU device, its share of the machine's or the container's memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        if path.exists() and (limit := path.read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits) // jax.local_device_count()
