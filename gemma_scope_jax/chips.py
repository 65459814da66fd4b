"""What chips can do, and what a step asks of them."""

import dataclasses

import jax
from gemma import gm

from gemma_scope_jax import bank, step
from gemma_scope_jax.models import forward
from gemma_scope_jax.models.sites import blocks_needed, site_width


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


def update_flops(plan: bank.Plan, model: gm.nn.Transformer, batch: int) -> int:
    """FLOPs of one update of a bank, padding included: five matrix products, seven with a skip connection."""
    d, o = (site_width(model, site) for site in (plan.members[0].site, plan.members[0].target_site))
    # Encoder and its gradient; decoder, its gradient, and what the latents receive.
    products = plan.width * (2 * d + 3 * o) + (2 * d * o if plan.members[0].skip else 0)
    return 2 * plan.padded_members * batch * products


def step_flops(plan: step.Plan, model: gm.nn.Transformer, length: int) -> tuple[int, list[int]]:
    """FLOPs of a steady step on all devices: of Gemma on rows of `length` tokens, and of each bank's updates."""
    depth = blocks_needed(plan.sites)
    banks = [update_flops(b, model, plan.batch) * plan.updates_per_step for b in plan.banks]
    return forward.harvest_flops(model, plan.activations // length, length, depth), banks
