"""The mesh of devices, and the layout of tokens on it.

The mesh has two axes. Tokens, Gemma's activations and the shuffle buffer are split over both. Only the SAEs use the
axes separately: a bank's members are split over `data`, their latents over `latent` (`training.shardings`).
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.runtime.errors import ConfigError

TOKENS = P(("data", "latent"))  # The leading axis of token rows and of the ring's groups.
REPLICATED = P()


def make_mesh(data: int, latent: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or over the given ones; `latent` = 0 means all that `data` leaves.

    Gemma's modules need an Auto mesh; JAX's default is Explicit.
    """
    devices = jax.devices() if devices is None else devices
    if data < 1:
        raise ConfigError(f"mesh.data is {data}; it must be at least 1")
    latent = latent or max(len(devices) // data, 1)
    if data * latent != len(devices):
        raise ConfigError(
            f"mesh.data × mesh.latent = {data} × {latent}, but there are {len(devices)} devices; set mesh.data "
            "and mesh.latent so that their product is that, or leave both at 0"
        )
    return jax.make_mesh((data, latent), ("data", "latent"), (AxisType.Auto,) * 2, devices=devices)


def constrain[T](mesh: Mesh, value: T, spec: P) -> T:
    """A tree of arrays with the layout of a spec, inside a compiled function."""
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))


def one_device() -> jax.sharding.Mesh:
    """A mesh of only this process's first device."""
    return make_mesh(1, 1, jax.local_devices()[:1])
