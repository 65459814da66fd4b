"""Shardings of the arrays in a run's state."""

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.runtime import sharding

MEMBERS_SPLIT = P("data", "latent")  # [E, B, …]: a member's batch is split over the chips that hold it
MEMBERS = P("data")  # [E, …]: a chip has the whole batch of its own members, and of no others

# Every array of a bank's state, by its field name (in `jumprelu.Params`, the optimizer's state or `bank.State`).
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
    "count": P("data"),  # The optimizer's count of updates.
}


def state_shardings(mesh: Mesh, state: object) -> object:
    """A tree of shardings for the training state, by field name. Arrays without a rule are replicated."""

    def place(path: tuple, value: jax.Array) -> NamedSharding:
        names = [getattr(part, "name", None) for part in path]
        if "slots" in names:
            return NamedSharding(mesh, sharding.TOKENS)
        named = [name for name in names if name in BANK]
        spec = BANK[named[-1]] if named else sharding.REPLICATED
        if named and value.shape[0] % mesh.shape["data"]:
            # The bank is still padded for another mesh, so `data` does not divide E: every device has all members.
            spec = P(None, *spec[1:])
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, state)
