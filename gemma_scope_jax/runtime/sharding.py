"""The mesh and every partition rule, in one place.

Two axes. Tokens, and with them Gemma's activations and the ring, are split over both; only the SAEs tell the
axes apart: a bank's members over `data`, their latents over `latent`.
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

TOKENS = P(("data", "latent"))  # The leading axis of token rows and of the ring's groups.
REPLICATED = P()
MEMBERS_SPLIT = P("data", "latent")  # [E, B, …], each member's batch split over the chips that hold it
MEMBERS = P("data")  # The leading axis of what each member of a bank takes: all of its batch, no one else's.

# Every array of a bank, by its field's name in `jumprelu.Params` or in the state that goes with it.
BANK = {
    "W_enc": P("data", None, "latent"),
    "W_dec": P("data", "latent", None),
    "b_enc": P("data", "latent"),
    "log_threshold": P("data", "latent"),
    "b_dec": P("data", None),
    "W_skip": P("data", None, "latent"),
    "count_ExM": P("data", "latent"),
    "frequency_ExM": P("data", "latent"),
    "rows_E": P("data"),
    "windows_E": P("data"),
    "updates_E": P("data"),
    "coefficient_E": P("data"),
    "count": P("data"),  # The optimizer's, of updates.
}


def make_mesh(data: int, latent: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or those given; `latent` = 0 means as many as `data` leaves.

    Gemma's modules need an Auto mesh, JAX's default is Explicit.
    """
    devices = jax.devices() if devices is None else devices
    if data < 1:
        raise ValueError(f"mesh.data is {data}; it must be at least 1")
    latent = latent or max(len(devices) // data, 1)
    if data * latent != len(devices):
        raise ValueError(f"mesh.data × mesh.latent = {data} × {latent}, but there are {len(devices)} devices")
    return jax.make_mesh((data, latent), ("data", "latent"), (AxisType.Auto,) * 2, devices=devices)


def gemma_placement(mesh: Mesh, split: bool) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Where Gemma's parameters lie, by name and shape: whole on every device, or `split` over all of them.

    Split is the largest dimension that the number of devices divides; a parameter that has none is small. Of the
    embedding it is the width: each device then looks up its part of every token's vector.
    """

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        candidates = shape[1:] if name == "input_embedding" else shape
        dividing = [size for size in candidates if size % mesh.size == 0]
        if not split or not dividing:
            return NamedSharding(mesh, REPLICATED)
        axis = shape.index(max(dividing))
        return NamedSharding(mesh, P(*[None] * axis, ("data", "latent")))

    return place


def state_shardings(mesh: Mesh, state: object) -> object:
    """A tree of shardings for the training state, by field name; what has no rule is replicated."""

    def place(path: tuple, value: jax.Array) -> NamedSharding:
        names = [getattr(part, "name", None) for part in path]
        if "slots" in names:
            return NamedSharding(mesh, TOKENS)
        named = [name for name in names if name in BANK]
        spec = BANK[named[-1]] if named else REPLICATED
        if named and value.shape[0] % mesh.shape["data"]:
            # A bank padded for another mesh, before it is padded for this one: its members on all devices.
            spec = P(None, *spec[1:])
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, state)


def constrain(mesh: Mesh, value: object, spec: P) -> object:
    """Inside a compiled function, a tree of arrays laid out by a spec."""
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))


def one_device() -> jax.sharding.Mesh:
    """A mesh of this process' first device alone."""
    return make_mesh(1, 1, jax.local_devices()[:1])
