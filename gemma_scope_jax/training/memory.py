"""What a run needs of each device, known before it starts."""

import dataclasses
import math

import jax

from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.training import step


@dataclasses.dataclass(frozen=True)
class Need:
    """Memory on each device."""

    what: str
    bytes: int
    remedy: str  # What to change if it is too much.


def bytes_per_device(tree: object) -> int:
    """Of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def needs(state: step.State, gemma: Gemma, temporary_bytes: int) -> list[Need]:
    """What Gemma, each bank, the ring and the step's own intermediate results take.

    Args:
      state: of the run, as shapes with shardings.
      gemma: likewise.
      temporary_bytes: the compiler's, for one device; 0 before it is known.
    """
    # Each bank's gradient is among the temporaries, and no smaller for smaller steps.
    gradients = {name: bytes_per_device(of_bank.params) for name, of_bank in state.banks.items()}
    others = max(temporary_bytes - sum(gradients.values()), 0)
    return [
        Need(
            "Gemma",
            bytes_per_device(gemma),
            "set mesh.gemma = split, or read no layer so deep",
        ),
        *(
            Need(
                f"bank {name}",
                bytes_per_device(of_bank) + (gradients[name] if temporary_bytes else 0),
                f"lower banks.{name}.width, name fewer SAEs, or lay it over more devices (mesh.data, mesh.latent)",
            )
            for name, of_bank in state.banks.items()
        ),
        Need("ring", bytes_per_device(state.ring), "lower ring.capacity"),
        *(
            [Need("the step's activations", others, "lower train.sequences_per_step, or train.batch")]
            if temporary_bytes
            else []
        ),
    ]


def too_large(state: step.State, gemma: Gemma, limit: float) -> str:
    """What to say where the compiler finds no room for a step whose arguments alone would fit."""
    return (
        f"{describe(needs(state, gemma, 0), limit)} With gradients and the step's activations it does not "
        "fit; lower train.sequences_per_step, or the banks' widths"
    )


def describe(found: list[Need], limit: float) -> str:
    """The needs in one line, in GB."""
    parts = [f"{need.what} {need.bytes / 1e9:.2f}" for need in found]
    total = sum(need.bytes for need in found)
    return f"Memory on each device, GB: {', '.join(parts)}; {total / 1e9:.2f} of {limit / 1e9:.2f}."


def check(found: list[Need], limit: float) -> None:
    """Raises ValueError if they do not fit, saying what to change."""
    if sum(need.bytes for need in found) > limit:
        largest = max(found, key=lambda need: need.bytes)
        raise ConfigError(
            f"{describe(found, limit)} That does not fit. Most is {largest.what}: {largest.remedy}"
        )
