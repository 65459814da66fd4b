"""Where the arrays of a run's state lie."""

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.runtime import sharding

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


def state_shardings(mesh: Mesh, state: object) -> object:
    """A tree of shardings for the training state, by field name; what has no rule is replicated."""

    def place(path: tuple, value: jax.Array) -> NamedSharding:
        names = [getattr(part, "name", None) for part in path]
        if "slots" in names:
            return NamedSharding(mesh, sharding.TOKENS)
        named = [name for name in names if name in BANK]
        spec = BANK[named[-1]] if named else sharding.REPLICATED
        if named and value.shape[0] % mesh.shape["data"]:
            # A bank padded for another mesh, before it is padded for this one: its members on all devices.
            spec = P(None, *spec[1:])
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, state)
