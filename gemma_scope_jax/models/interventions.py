"""Changes to the forward pass, and what a model makes of them: splices, losses, likelihoods and gradients."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from gemma import gm
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.models import forward, masking, predictions, weights
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding


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


def _whole(mesh: jax.sharding.Mesh, params: weights.Params) -> weights.Params:
    """Blocks whole on each chip, one after the other, and the embedding too, which here makes logits."""
    return {
        **forward.gather_gemma(mesh, params),
        "embedder": sharding.constrain(mesh, params["embedder"], P()),
    }


@functools.partial(jax.jit, static_argnames=("mesh", "model", "sites"))
def clean(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    tokens_SxL: jax.Array,
    sites: tuple[Site, ...],
) -> tuple[dict[int, jax.Array], dict[Site, jax.Array], jax.Array]:
    """One forward pass: the streams before each site's block, the sites' activations, the stream behind the last."""
    params = forward.gather_gemma(mesh, params)
    x_SxLxD = sharding.constrain(mesh, forward.embed(model, params, tokens_SxL), sharding.TOKENS)
    before = {site.layer: Site("resid_post", site.layer - 1) for site in sites if site.layer}
    layers = range(model.config.num_layers)
    read = {*sites, *before.values()}
    final_SxLxD, values = forward.run_blocks(model, params, x_SxLxD, tokens_SxL, layers, read=read)
    streams = {0: x_SxLxD, **{layer: values[site] for layer, site in before.items()}}
    return streams, {site: values[site] for site in sites}, final_SxLxD


@functools.partial(jax.jit, static_argnames=("mesh", "model", "site"))
def spliced(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    before_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
    site: Site,
    replacement_SxLxD: jax.Array,
) -> jax.Array:
    """The residual stream behind the last block, with something else in the site's place, or [1, 1, D] everywhere."""

    def replace(x_SxLxD: jax.Array) -> jax.Array:
        return jnp.where(is_kept_SxL[..., None], replacement_SxLxD.astype(x_SxLxD.dtype), x_SxLxD)

    layers = range(site.layer, model.config.num_layers)
    params = forward.gather_gemma(mesh, params)
    return forward.run_blocks(model, params, before_SxLxD, tokens_SxL, layers, write={site: replace})[0]


# Apart from the blocks: XLA's CPU backend makes the two together slower than they are one after the other.
@functools.partial(jax.jit, static_argnames=("mesh", "model"))
def loss(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    final_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
) -> dict[str, jax.Array]:
    """The loss of each prediction, 0 where it is not scored, and where it is."""
    params = _whole(mesh, params)
    loss_SxL, scored_SxL = predictions.next_token_loss(
        model, params, final_SxLxD, tokens_SxL, is_kept_SxL, 64 * mesh.size
    )
    return sharding.constrain(mesh, {"loss_SxL": loss_SxL * scored_SxL, "scored_SxL": scored_SxL}, P())


@functools.partial(jax.jit, static_argnames=("mesh", "model"))
def likelihoods(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    final_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
    chosen_T: jax.Array,
) -> dict[str, jax.Array]:
    """`loss`, and the mean log-probability that each prediction gives to some tokens, from the same logits."""
    next_SxLx1 = masking.next_tokens(tokens_SxL)[..., None]
    chosen_SxLxT = jnp.broadcast_to(chosen_T[None, None], (*tokens_SxL.shape, chosen_T.size))
    asked_SxLxT = jnp.concatenate([next_SxLx1, chosen_SxLxT], axis=-1)
    params = _whole(mesh, params)
    log_p_SxLxT = predictions.log_probabilities(model, params, final_SxLxD, asked_SxLxT, 64 * mesh.size)
    scored_SxL = masking.is_scored(tokens_SxL, is_kept_SxL).astype(jnp.float32)
    found = {
        "loss_SxL": -log_p_SxLxT[..., 0] * scored_SxL,
        "chosen_SxL": log_p_SxLxT[..., 1:].mean(-1) * scored_SxL,
        "scored_SxL": scored_SxL,
    }
    return sharding.constrain(mesh, found, P())


@functools.partial(jax.jit, static_argnames=("mesh", "model"))
def divergence(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    final_SxLxD: jax.Array,
    clean_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
) -> dict[str, jax.Array]:
    """The loss of each prediction and its divergence from the clean one, 0 where it is not scored."""
    params = _whole(mesh, params)
    found = predictions.next_token_divergence(
        model, params, final_SxLxD, clean_SxLxD, tokens_SxL, 64 * mesh.size
    )
    scored_SxL = masking.is_scored(tokens_SxL, is_kept_SxL)
    loss_SxL, kl_SxL = (jnp.where(scored_SxL, value, 0) for value in found)
    return sharding.constrain(mesh, {"loss_SxL": loss_SxL, "kl_SxL": kl_SxL}, P())


@functools.partial(jax.jit, static_argnames=("mesh", "model", "site"))
def importance(
    mesh: jax.sharding.Mesh,
    model: gm.nn.Transformer,
    params: weights.Params,
    before_SxLxD: jax.Array,
    value_SxLxO: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array,
    site: Site,
) -> jax.Array:
    """The gradient [S, L, O], at the site's activations, of the sum of all scored centred logits of next tokens."""
    scored_SxL = masking.is_scored(tokens_SxL, is_kept_SxL)
    layers = range(site.layer, model.config.num_layers)

    # Block by block, each computed again on the way back: what one needs inside, and its weights where they are split
    # and gathered, lies on the chip for one block at a time.
    @functools.partial(jax.checkpoint, static_argnums=0)
    def block(layer: int, x_SxLxD: jax.Array, value_SxLxO: jax.Array) -> jax.Array:
        write = {site: lambda _: value_SxLxO} if layer == site.layer else {}
        gathered = forward.gather_gemma(mesh, params)
        only = range(layer, layer + 1)
        return forward.run_blocks(model, gathered, x_SxLxD, tokens_SxL, only, write=write)[0]

    def total(value_SxLxO: jax.Array) -> jax.Array:
        x_SxLxD = before_SxLxD
        for layer in layers:
            x_SxLxD = block(layer, x_SxLxD, value_SxLxO)
        logits_SxL = predictions.centred_logits(
            model, _whole(mesh, params), x_SxLxD, tokens_SxL, 64 * mesh.size
        )
        return jnp.where(scored_SxL, logits_SxL, 0).sum()

    return jax.grad(total)(value_SxLxO)
