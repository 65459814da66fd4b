"""Compiled passes of a model over rows, clean or with sites written: activations, losses, likelihoods, gradients."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.models import forward, interventions, masking, predictions
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding


@functools.partial(jax.jit, static_argnames="sites")
def clean(
    gemma: Gemma,
    tokens_SxL: jax.Array,
    sites: tuple[Site, ...],
) -> tuple[dict[int, jax.Array], dict[Site, jax.Array], jax.Array]:
    """One forward pass: the residual streams before each site's block, the sites' activations, the final stream."""
    gemma = gemma.gathered()
    x_SxLxD = sharding.constrain(gemma.mesh, forward.embed(gemma, tokens_SxL), sharding.TOKENS)
    before = {site.layer: Site("resid_post", site.layer - 1) for site in sites if site.layer}
    layers = gemma.layers
    read = {*sites, *before.values()}
    final_SxLxD, values = forward.run_blocks(gemma, x_SxLxD, tokens_SxL, layers, read=read)
    streams = {0: x_SxLxD, **{layer: values[site] for layer, site in before.items()}}
    return streams, {site: values[site] for site in sites}, final_SxLxD


@functools.partial(jax.jit, static_argnames=("read", "first"))
def written(
    gemma: Gemma,
    tokens_SxL: jax.Array,
    write: Mapping[Site, jax.tree_util.Partial],
    read: tuple[Site, ...] = (),
    first: int = 0,
    before_SxLxD: jax.Array | None = None,
) -> tuple[jax.Array, dict[Site, jax.Array]]:
    """One pass over packed rows, all of them prompt tokens, with sites written.

    Args:
      gemma: the model.
      tokens_SxL: the rows.
      write: interventions, by site; the same function object reuses the compiled pass.
      read: sites whose activations are returned, as they are before any write.
      first: the block to begin with.
      before_SxLxD: the residual stream before that block; None for the embeddings.

    Returns:
      The residual stream [S, L, D] after the last block, and the activations of the sites in `read`.
    """
    gemma = gemma.gathered()
    if before_SxLxD is None:
        before_SxLxD = sharding.constrain(gemma.mesh, forward.embed(gemma, tokens_SxL), sharding.TOKENS)
    positions_SxL = masking.packed_positions(tokens_SxL)
    replace = interventions.at(write, tokens_SxL, positions_SxL, jnp.full(tokens_SxL.shape, True))
    return forward.run_blocks(gemma, before_SxLxD, tokens_SxL, gemma.layers[first:], read=read, write=replace)


def spliced(
    gemma: Gemma,
    before_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
    site: Site,
    replacement_SxLxD: jax.Array,
) -> jax.Array:
    """The residual stream after the last block, with a site's activations replaced; see `interventions.splice`."""
    write = {site: interventions.splice(is_kept_SxL, replacement_SxLxD)}
    return written(gemma, tokens_SxL, write, first=site.layer, before_SxLxD=before_SxLxD)[0]


# Compiled separately from the blocks: in one program, the two are slower on XLA's CPU backend.
@jax.jit
def loss(
    gemma: Gemma,
    final_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
) -> dict[str, jax.Array]:
    """The loss of each prediction, 0 where it is not scored, and the mask of scored predictions."""
    gemma = gemma.whole()
    loss_SxL, scored_SxL = predictions.next_token_loss(
        gemma, final_SxLxD, tokens_SxL, is_kept_SxL, 64 * gemma.mesh.size
    )
    return sharding.constrain(gemma.mesh, {"loss_SxL": loss_SxL * scored_SxL, "scored_SxL": scored_SxL}, P())


@jax.jit
def likelihoods(
    gemma: Gemma,
    final_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
    chosen_T: jax.Array,
) -> dict[str, jax.Array]:
    """`loss`, and the mean log-probability of the tokens `chosen_T` at each prediction, from the same logits."""
    next_SxLx1 = masking.next_tokens(tokens_SxL)[..., None]
    chosen_SxLxT = jnp.broadcast_to(chosen_T[None, None], (*tokens_SxL.shape, chosen_T.size))
    asked_SxLxT = jnp.concatenate([next_SxLx1, chosen_SxLxT], axis=-1)
    gemma = gemma.whole()
    log_p_SxLxT = predictions.log_probabilities(gemma, final_SxLxD, asked_SxLxT, 64 * gemma.mesh.size)
    scored_SxL = masking.is_scored(tokens_SxL, is_kept_SxL).astype(jnp.float32)
    found = {
        "loss_SxL": -log_p_SxLxT[..., 0] * scored_SxL,
        "chosen_SxL": log_p_SxLxT[..., 1:].mean(-1) * scored_SxL,
        "scored_SxL": scored_SxL,
    }
    return sharding.constrain(gemma.mesh, found, P())


@jax.jit
def divergence(
    gemma: Gemma,
    final_SxLxD: jax.Array,
    clean_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
) -> dict[str, jax.Array]:
    """The loss of each prediction and its KL divergence from the clean prediction, 0 where it is not scored."""
    gemma = gemma.whole()
    found = predictions.next_token_divergence(
        gemma, final_SxLxD, clean_SxLxD, tokens_SxL, 64 * gemma.mesh.size
    )
    scored_SxL = masking.is_scored(tokens_SxL, is_kept_SxL)
    loss_SxL, kl_SxL = (jnp.where(scored_SxL, value, 0) for value in found)
    return sharding.constrain(gemma.mesh, {"loss_SxL": loss_SxL, "kl_SxL": kl_SxL}, P())


@functools.partial(jax.jit, static_argnames="site")
def importance(
    gemma: Gemma,
    before_SxLxD: jax.Array,
    value_SxLxO: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
    site: Site,
) -> jax.Array:
    """The gradient [S, L, O], at the site's activations, of the sum of all scored centred next-token logits."""
    scored_SxL = masking.is_scored(tokens_SxL, is_kept_SxL)
    layers = gemma.layers[site.layer :]

    # Each block is recomputed in the backward pass, so that the chip holds the intermediate values and the gathered
    # weights of one block at a time.
    @functools.partial(jax.checkpoint, static_argnums=0)
    def block(layer: int, x_SxLxD: jax.Array, value_SxLxO: jax.Array) -> jax.Array:
        write = {site: lambda _: value_SxLxO} if layer == site.layer else {}
        gathered = gemma.gathered()
        only = range(layer, layer + 1)
        return forward.run_blocks(gathered, x_SxLxD, tokens_SxL, only, write=write)[0]

    def total(value_SxLxO: jax.Array) -> jax.Array:
        x_SxLxD = before_SxLxD
        for layer in layers:
            x_SxLxD = block(layer, x_SxLxD, value_SxLxO)
        logits_SxL = predictions.centred_logits(gemma.whole(), x_SxLxD, tokens_SxL, 64 * gemma.mesh.size)
        return jnp.where(scored_SxL, logits_SxL, 0).sum()

    return jax.grad(total)(value_SxLxO)
