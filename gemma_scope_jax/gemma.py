"""Gemma by name, and a walk over its blocks in which any site can be read or written.

Shapes: S sequences, L context length, D site width, N heads, H head width, V vocabulary.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import sentencepiece
from flax import linen as nn
from gemma import gm

from gemma_scope_jax import weights

PAD, EOS, BOS = 0, 1, 2  # The same in every Gemma.

MODELS: Mapping[str, type[gm.nn.Transformer]] = {"gemma3_270m": gm.nn.Gemma3_270M}

HUGGING_FACE_NAMES: Mapping[str, str] = {"gemma3_270m": "google/gemma-3-270m"}

# Kinds of site, with TransformerLens' names for them.
HOOKS: Mapping[str, str] = {
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "attn.hook_z",
}


class Site(NamedTuple):
    """A place in the model where activations are read or written (Gemma Scope, section 3.1).

    `resid_post` is the residual stream after the block, `mlp_out` what the MLP adds to it (after the
    post-norm), `attn_out` the heads' outputs, concatenated, before the output projection.
    """

    kind: str
    layer: int

    def __str__(self) -> str:
        return f"layer_{self.layer}_{self.kind}"


Tokenizer = sentencepiece.SentencePieceProcessor | gm.text.Tokenizer

# Called with every site the walk passes and its value; what it returns takes the value's place.
Tap = Callable[[Site, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Gemma:
    """A model with weights. `params` may lack the blocks behind `num_layers`."""

    name: str
    model: gm.nn.Transformer
    params: weights.Params
    num_layers: int


def build_model(name: str) -> gm.nn.Transformer:
    """The Linen module of a model by name, without weights."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]()


def load(
    name: str,
    path: str,
    dtype: jnp.dtype,
    num_layers: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Gemma:
    """Loads a model, all of it or only its first `num_layers` blocks.

    An empty `path` means the weights that come with the requirements; no `sharding` the default device.
    """
    model = build_model(name)
    num_layers = model.config.num_layers if num_layers is None else num_layers
    params = weights.load_params(path or weights.default_weights(name), model, num_layers, dtype)
    return Gemma(name, model, jax.device_put(params, sharding), num_layers)


def load_tokenizer(name: str, path: str) -> Tokenizer:
    """The tokenizer of a model: from the GGUF file of its weights, or gemma's own beside a checkpoint.

    `encode` of either gives tokens without BOS.
    """
    path = path or weights.default_weights(name)
    if weights.is_gguf(path):
        return weights.tokenizer_from_gguf(path)
    return gm.text.Gemma3Tokenizer()


def check_site(model: gm.nn.Transformer, site: Site) -> None:
    """Raises ValueError if the model has no such site."""
    if site.kind not in HOOKS:
        raise ValueError(f"unknown site {site.kind!r}; choose one of {', '.join(HOOKS)}")
    layers = model.config.num_layers
    if not 0 <= site.layer < layers:
        raise ValueError(
            f"layer {site.layer} is out of range: {type(model).__name__} has layers 0 to {layers - 1}"
        )


def hook_name(site: Site) -> str:
    """TransformerLens' name of a site."""
    return f"blocks.{site.layer}.{HOOKS[site.kind]}"


def site_from_hook(name: str) -> Site:
    """The site that TransformerLens calls `name`."""
    for kind, hook in HOOKS.items():
        if match := re.fullmatch(rf"blocks\.(\d+)\.{re.escape(hook)}", name):
            return Site(kind, int(match[1]))
    raise ValueError(f"no site is known for the hook {name!r}")


def site_width(model: gm.nn.Transformer, site: Site) -> int:
    """The width D of a site's activations."""
    config = model.config
    return config.num_heads * config.head_dim if site.kind == "attn_out" else config.embed_dim


def is_special(tokens: jax.Array) -> jax.Array:
    """True at BOS, EOS and PAD: positions that are never trained on and never scored."""
    return (tokens == BOS) | (tokens == EOS) | (tokens == PAD)


def packed_positions_and_mask(tokens_SxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions [S, L] and attention mask [S, L, L] of rows in which each segment begins with its own BOS.

    Segments do not attend to each other and each begins at position 0, so a packed segment sees exactly
    what it would see alone.
    """
    index_SxL = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1])[None], tokens_SxL.shape)
    is_start_SxL = tokens_SxL == BOS
    segment_SxL = jnp.cumsum(is_start_SxL, axis=1)
    start_SxL = jax.lax.cummax(jnp.where(is_start_SxL, index_SxL, 0), axis=1)
    same_SxLxL = segment_SxL[:, :, None] == segment_SxL[:, None, :]
    causal_LxL = jnp.tri(tokens_SxL.shape[1], dtype=bool)
    mask_SxLxL = same_SxLxL & causal_LxL[None] & (tokens_SxL != PAD)[:, None, :]
    return index_SxL - start_SxL, mask_SxLxL


def embed(model: gm.nn.Transformer, params: weights.Params, tokens_SxL: jax.Array) -> jax.Array:
    """The residual stream [S, L, D] before the first block."""
    return model.apply({"params": params}, method=lambda model: model.embedder.encode(tokens_SxL))


def run_blocks(
    model: gm.nn.Transformer,
    params: weights.Params,
    x_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    layers: range,
    tap: Tap | None = None,
) -> jax.Array:
    """The residual stream after `layers`, given the one before them; `tap` reads or writes on the way."""
    positions_SxL, mask_SxLxL = packed_positions_and_mask(tokens_SxL)

    def walk(model: gm.nn.Transformer, x_SxLxD: jax.Array) -> jax.Array:
        for layer in layers:
            with nn.intercept_methods(functools.partial(_tap_inside_block, layer, tap)):
                _, x_SxLxD = model.blocks[layer](x_SxLxD, positions_SxL, None, mask_SxLxL)
            if tap is not None:
                x_SxLxD = tap(Site("resid_post", layer), x_SxLxD)
        return x_SxLxD

    return model.apply({"params": params}, x_SxLxD, method=walk)


def _tap_inside_block(
    layer: int,
    tap: Tap | None,
    call: Callable,
    args: tuple,
    kwargs: dict,
    context: nn.module.InterceptorContext,
) -> object:
    """A Flax interceptor. Safe here because no `nn.jit` lies between the walk and the block's modules."""
    if tap is None or context.method_name != "__call__":
        return call(*args, **kwargs)
    if context.module.name == "attn_vec_einsum":
        equation, heads_SxLxNxH = args
        shape = heads_SxLxNxH.shape
        z_SxLxD = tap(Site("attn_out", layer), heads_SxLxNxH.reshape(*shape[:2], -1))
        return call(equation, z_SxLxD.reshape(shape), **kwargs)
    value = call(*args, **kwargs)
    return tap(Site("mlp_out", layer), value) if context.module.name == "post_ffw_norm" else value


def read_sites(
    model: gm.nn.Transformer, params: weights.Params, tokens_SxL: jax.Array, sites: Sequence[Site]
) -> dict[Site, jax.Array]:
    """Activations [S, L, D] of `sites`. Nothing behind the deepest of them is computed, nor its weights needed."""
    values = {}

    def tap(site: Site, value: jax.Array) -> jax.Array:
        if site in sites:
            values[site] = value
        return value

    depth = max(site.layer for site in sites) + 1
    run_blocks(model, params, embed(model, params, tokens_SxL), tokens_SxL, range(depth), tap)
    return values


def next_token_loss(
    model: gm.nn.Transformer,
    params: weights.Params,
    x_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats of each next token, from the residual stream behind the last block.

    Args:
      x_SxLxD: the residual stream behind the last block.
      tokens_SxL: the packed rows.
      chunk: predictions whose logits [chunk, V] exist at a time; all of them would be [S, L, V].

    Returns:
      loss_SxL and weight_SxL in float32: the loss of predicting position t + 1 from position t, and 1 where
      that is scored, 0 where t is BOS, EOS or PAD, or where t + 1 begins another segment or is padding.
    """
    target_SxL = jnp.pad(tokens_SxL[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)
    scored_SxL = ~is_special(tokens_SxL) & (target_SxL != PAD) & (target_SxL != BOS)

    def chunk_loss(x_CxD: jax.Array, target_C: jax.Array) -> jax.Array:
        def decode(model: gm.nn.Transformer) -> jax.Array:
            return model.embedder.decode(model.final_norm(x_CxD))

        logits_CxV = model.apply({"params": params}, method=decode).astype(jnp.float32)
        cap = model.config.final_logit_softcap
        if cap is not None:
            logits_CxV = jnp.tanh(logits_CxV / cap) * cap
        correct_C = jnp.take_along_axis(logits_CxV, target_C[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits_CxV, axis=1) - correct_C

    count = target_SxL.size
    chunk = min(chunk, count)
    pad = -count % chunk
    x_PxD = jnp.pad(x_SxLxD.reshape(count, -1), ((0, pad), (0, 0)))
    target_P = jnp.pad(target_SxL.reshape(count), (0, pad))
    loss = jax.lax.map(
        lambda xs: chunk_loss(*xs), (x_PxD.reshape(-1, chunk, x_PxD.shape[1]), target_P.reshape(-1, chunk))
    )
    return loss.reshape(-1)[:count].reshape(target_SxL.shape), scored_SxL.astype(jnp.float32)
