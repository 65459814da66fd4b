"""SAEs as they are used: attached to the sites of a model, on its mesh."""

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma_scope_jax import sae
from gemma_scope_jax.runtime import sharding


def latent_specs(mesh: jax.sharding.Mesh, width: int) -> dict[str, P]:
    """Where an SAE's arrays that have latents lie: over all devices where these divide."""
    axes = ("data", "latent") if width % mesh.size == 0 else None
    return {"W_enc": P(None, axes), "b_enc": P(axes), "threshold": P(axes), "W_dec": P(axes, None)}


def place(mesh: jax.sharding.Mesh, subject: sae.SAE) -> sae.SAE:
    """An SAE on the devices; see `latent_specs`."""
    specs = latent_specs(mesh, subject.b_enc.size)

    def place(name: str, value: np.ndarray) -> jax.Array:
        placed = jax.NamedSharding(mesh, specs.get(name, P()))
        return jax.make_array_from_callback(value.shape, placed, lambda index: np.asarray(value[index]))

    named = {name: value for name, value in vars(subject).items() if value is not None}
    return sae.SAE(**{name: place(name, value) for name, value in named.items()})


def encoder(mesh: jax.sharding.Mesh, subject: sae.SAE) -> sae.SAE:
    """What encodes, whole on every device of a mesh; a decoder is not there."""
    encodes = subject.replace(W_dec=None, b_dec=None, W_skip=None)
    return jax.device_put(encodes, jax.NamedSharding(mesh, sharding.REPLICATED))
