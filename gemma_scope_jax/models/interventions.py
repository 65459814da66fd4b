"""Changes to the forward pass: functions that replace a site's activations."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_scope_jax.models import forward
from gemma_scope_jax.models.sites import Site


class Where(NamedTuple):
    """The tokens that a site's activations belong to; arrays are [S, L]."""

    tokens_SxL: jax.Array
    positions_SxL: jax.Array  # Counted from the prompt's BOS at 0; padding is below 0.
    is_prompt_SxL: jax.Array
    # The replacements at sites written earlier in this pass.
    passed: Mapping[Site, jax.Array]


# Maps a site's activations [S, L, D] to their replacement: first for whole prompts, then for one token at a time.
Intervention = Callable[[jax.Array, Where], jax.Array]


def at(
    write: Mapping[Site, Intervention],
    tokens_SxL: jax.Array,
    positions_SxL: jax.Array,
    is_prompt_SxL: jax.Array,
) -> dict[Site, forward.Write]:
    """The interventions of one pass over these tokens, in the form that `forward.walk` takes."""
    passed: dict[Site, jax.Array] = {}
    where = Where(tokens_SxL, positions_SxL, is_prompt_SxL, passed)

    def intervene(site: Site, x_SxLxD: jax.Array) -> jax.Array:
        passed[site] = write[site](x_SxLxD, where)
        return passed[site]

    return {site: functools.partial(intervene, site) for site in write}


def splice(is_meant_SxL: jax.Array, replacement_SxLxD: jax.Array) -> jax.tree_util.Partial:
    """The intervention that replaces activations where `is_meant`; a [1, 1, D] replacement is used for all."""
    return jax.tree_util.Partial(_spliced, is_meant_SxL, replacement_SxLxD)


def _spliced(
    is_meant_SxL: jax.Array, replacement_SxLxD: jax.Array, x_SxLxD: jax.Array, where: Where
) -> jax.Array:
    del where
    return jnp.where(is_meant_SxL[..., None], replacement_SxLxD.astype(x_SxLxD.dtype), x_SxLxD)
