"""Changes to the forward pass: functions of a site's activations whose results take their place."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_scope_jax.models import forward
from gemma_scope_jax.models.sites import Site


class Where(NamedTuple):
    """Of which tokens a site's activations are, each [S, L]."""

    tokens_SxL: jax.Array
    positions_SxL: jax.Array  # Behind the prompt's BOS, which is at 0; below 0 is padding.
    is_prompt_SxL: jax.Array
    # What the sites written before this one became, in this pass.
    passed: Mapping[Site, jax.Array]


# From a site's activations [S, L, D] to what takes their place: of whole prompts first, then of one token at a time.
Intervention = Callable[[jax.Array, Where], jax.Array]


def at(
    write: Mapping[Site, Intervention],
    tokens_SxL: jax.Array,
    positions_SxL: jax.Array,
    is_prompt_SxL: jax.Array,
) -> dict[Site, forward.Write]:
    """Interventions on one pass over these tokens, for `forward.walk`."""
    passed: dict[Site, jax.Array] = {}
    where = Where(tokens_SxL, positions_SxL, is_prompt_SxL, passed)

    def intervene(site: Site, x_SxLxD: jax.Array) -> jax.Array:
        passed[site] = write[site](x_SxLxD, where)
        return passed[site]

    return {site: functools.partial(intervene, site) for site in write}


def splice(is_meant_SxL: jax.Array, replacement_SxLxD: jax.Array) -> jax.tree_util.Partial:
    """The intervention that replaces activations where `is_meant`; by one of shape [1, 1, D] all of them alike."""
    return jax.tree_util.Partial(_spliced, is_meant_SxL, replacement_SxLxD)


def _spliced(
    is_meant_SxL: jax.Array, replacement_SxLxD: jax.Array, x_SxLxD: jax.Array, where: Where
) -> jax.Array:
    del where
    return jnp.where(is_meant_SxL[..., None], replacement_SxLxD.astype(x_SxLxD.dtype), x_SxLxD)
