"""The memory that a run needs on each device, computed before it starts."""

import dataclasses
import math

import jax

from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.training import step


@dataclasses.dataclass(frozen=True)
class Need:
    """The memory on each device for one part of a run."""

    what: str
    bytes: int
    remedy: str  # What to change if the run does not fit.


def bytes_per_device(tree: object) -> int:
    """Bytes on each device of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def needs(state: step.State, gemma: Gemma, temporary_bytes: int) -> list[Need]:
    """The memory of Gemma, each bank, the ring and the step's intermediate results.

    Args:
      state: the run's state, as shapes with shardings.
      gemma: Gemma, as shapes with shardings.
      temporary_bytes: the compiler's temporary memory on one device; 0 before it is known.
    """
    # The temporaries include each bank's gradient, which smaller steps would not reduce.
    gradients = {name: bytes_per_device(of_bank.params) for name, of_bank in state.banks.items()}
    others = max(temporary_bytes - sum(gradients.values()), 0)
    return [
        Need(
            "Gemma",
            bytes_per_device(gemma),
            "set mesh.gemma = split, or read shallower layers",
        ),
        *(
            Need(
                f"bank {name}",
                bytes_per_device(of_bank) + (gradients[name] if temporary_bytes else 0),
                f"lower banks.{name}.width, train fewer SAEs, or split it over more devices (mesh.data, mesh.latent)",
            )
            for name, of_bank in state.banks.items()
        ),
        Need("ring", bytes_per_device(state.ring), "lower ring.capacity"),
        *(
            [Need("the step's activations", others, "lower train.sequences_per_step or train.batch")]
            if temporary_bytes
            else []
        ),
    ]


def too_large(state: step.State, gemma: Gemma, limit: float) -> str:
    """The error message for a step that does not fit, although its arguments alone do."""
    return (
        "the run does not fit in memory once gradients and the step's activations are added. "
        f"{describe(needs(state, gemma, 0), limit)} Lower train.sequences_per_step or the banks' widths"
    )


def describe(found: list[Need], limit: float) -> str:
    """One line with the memory of each part, in GB."""
    parts = [f"{need.what} {need.bytes / 1e9:.2f}" for need in found]
    total = sum(need.bytes for need in found)
    return f"Memory on each device in GB: {', '.join(parts)}; total {total / 1e9:.2f} of {limit / 1e9:.2f}."


def check(found: list[Need], limit: float) -> None:
    """Checks that the parts fit in `limit` bytes.

    Raises:
      ValueError: if they do not fit. The message names the largest part and what to change.
    """
    if sum(need.bytes for need in found) > limit:
        largest = max(found, key=lambda need: need.bytes)
        raise ConfigError(
            f"the run does not fit in memory. {describe(found, limit)} "
            f"The largest part is {largest.what}: {largest.remedy}"
        )
