"""SAEs in use: a `Subject` is an SAE at the sites of a model, and `place` puts an SAE on a mesh."""

import dataclasses
import itertools
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import jumprelu


def latent_specs(mesh: jax.sharding.Mesh, width: int) -> dict[str, P]:
    """Partition specs of the arrays with a latent axis: split over all devices if their number divides `width`."""
    axes = ("data", "latent") if width % mesh.size == 0 else None
    return {"W_enc": P(None, axes), "b_enc": P(axes), "threshold": P(axes), "W_dec": P(axes, None)}


def place(mesh: jax.sharding.Mesh, subject: jumprelu.SAE) -> jumprelu.SAE:
    """Puts an SAE on the devices of a mesh, sharded as in `latent_specs`."""
    specs = latent_specs(mesh, subject.b_enc.size)

    def place(name: str, value: np.ndarray) -> jax.Array:
        placed = jax.NamedSharding(mesh, specs.get(name, P()))
        return jax.make_array_from_callback(value.shape, placed, lambda index: np.asarray(value[index]))

    named = {name: value for name, value in vars(subject).items() if value is not None}
    return jumprelu.SAE(**{name: place(name, value) for name, value in named.items()})


def encoder(mesh: jax.sharding.Mesh, subject: jumprelu.SAE) -> jumprelu.SAE:
    """The encoder of an SAE, replicated on every device of a mesh; the decoder's arrays are None."""
    encodes = subject.replace(W_dec=None, b_dec=None, W_skip=None)
    return jax.device_put(encodes, jax.NamedSharding(mesh, sharding.REPLICATED))


@dataclasses.dataclass(frozen=True)
class Subject:
    """An SAE to evaluate at a site of its model, or a transcoder, whose output replaces its target site."""

    sae: jumprelu.SAE
    site: Site
    mean_O: np.ndarray | None  # The target's mean for mean ablation; None: measured on training rows.
    target_site: Site | None = None  # For a transcoder: the site it predicts, at the same layer.
    top_k: int | None = None  # Only the top_k strongest latents of an activation are kept; None: all.

    @property
    def spliced(self) -> Site:
        """The site whose activations the output replaces."""
        return self.target_site or self.site


def identity(subject: Subject) -> list:
    """Values that change whenever the SAE, its sites or `top_k` change."""
    arrays = (value for value in vars(subject.sae).values() if value is not None)
    digest = 0
    for value in itertools.chain(arrays, [] if subject.mean_O is None else [subject.mean_O]):
        digest = zlib.crc32(np.ascontiguousarray(value), digest)
    return [digest, str(subject.site), str(subject.spliced), subject.top_k]


def alone(subject: Subject, latents: Sequence[int]) -> Subject:
    """A subject whose SAE has only these latents, in this order."""
    of, latents = subject.sae, np.asarray(latents)
    few = {
        "W_enc": np.asarray(of.W_enc)[:, latents],
        **{name: np.asarray(getattr(of, name))[latents] for name in ("b_enc", "threshold", "W_dec")},
    }
    return dataclasses.replace(subject, sae=of.replace(**few))
