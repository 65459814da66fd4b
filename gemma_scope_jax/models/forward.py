"""The forward pass: a walk over Gemma's blocks in which any site can be read or written.

Shapes: S sequences, L context length, D site width, N heads, H head width, C positions attended to.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma_scope_jax.models import masking, weights
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.models.sites import Site, blocks_needed
from gemma_scope_jax.runtime.errors import InputError

# Maps a site's activations [S, L, D] to their replacement.
Write = Callable[[jax.Array], jax.Array]

# The gemma package's cache, by a block's name in the parameters: keys, values, positions, and the used slots' count.
Cache = Mapping[str, Mapping[str, jax.Array]]


def matmul_precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """The matmul precision for a dtype: full float32 for float32, which a TPU multiplies in bfloat16 by default."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def _normalize(x: jax.Array) -> jax.Array:
    """`x` divided by its root mean square, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def float32_norm(
    x: jax.Array, module: gm.nn.RMSNorm, tap: Callable[[jax.Array], jax.Array] = lambda x: x
) -> jax.Array:
    """The output of `module` for `x`, computed in float32 and then rounded; `tap` is called before the gain."""
    scale_D = module.get_variable("params", "scale").astype(jnp.float32)
    return (tap(_normalize(x)) * (1 + scale_D.reshape((1,) * (x.ndim - 1) + (-1,)))).astype(x.dtype)


def mlp_in_gain(params: weights.Params, layer: int) -> jax.Array:
    """The gain [D] in float32 by which `mlp_in_gain_free` is multiplied to give `mlp_in`."""
    return 1 + params[f"layer_{layer}"]["pre_ffw_norm"]["scale"].astype(jnp.float32)


def embed(gemma: Gemma, tokens_SxL: jax.Array) -> jax.Array:
    """The residual stream [S, L, D] before the first block."""
    return gemma.module.apply(
        {"params": gemma.params}, method=lambda model: model.embedder.encode(tokens_SxL)
    )


def run_blocks(
    gemma: Gemma,
    x_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    layers: range,
    read: Collection[Site] = (),
    write: Mapping[Site, Write] | None = None,
) -> tuple[jax.Array, dict[Site, jax.Array]]:
    """Runs `layers` on the residual stream before them.

    Args:
      gemma: the model; only its blocks in `layers` are used.
      x_SxLxD: the residual stream before the first block of `layers`.
      tokens_SxL: the packed rows.
      layers: the blocks to run.
      read: sites whose activations are returned, as they are before any write.
      write: functions, by site, that map its activations to their replacement.

    Returns:
      The residual stream after `layers`, and the activations of the sites in `read`, all in the dtype of `x_SxLxD`.

    Raises:
      ValueError: if a site in `read` or `write` is not in `layers`.
    """
    positions_SxL, mask_SxLxL = masking.packed_positions(tokens_SxL), masking.packed_mask(tokens_SxL)
    return walk(gemma, x_SxLxD, positions_SxL, mask_SxLxL, layers, read, write)[:2]


def walk(
    gemma: Gemma,
    x_SxLxD: jax.Array,
    positions_SxL: jax.Array,
    mask_SxLxC: jax.Array,
    layers: range,
    read: Collection[Site] = (),
    write: Mapping[Site, Write] | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, dict[Site, jax.Array], Cache]:
    """`run_blocks` at any positions and, with a cache, after tokens that were run before.

    The mask says which slots of the cache each token attends to, its own included. Without a cache, the slots are
    the tokens themselves. The returned cache also holds these tokens; without a cache it holds nothing.
    """
    write = write or {}
    dtype = x_SxLxD.dtype
    values, passed, grown = {}, set(), {}

    def tap(site: Site, value: jax.Array) -> jax.Array:
        passed.add(site)
        if site in read:
            values[site] = value.astype(dtype)
        return write[site](value.astype(dtype)).astype(value.dtype) if site in write else value

    def through(model: gm.nn.Transformer, x_SxLxD: jax.Array) -> jax.Array:
        if layers.start == 0:
            x_SxLxD = tap(Site("embed", 0), x_SxLxD)
        for layer in layers:
            name = f"layer_{layer}"
            before = None if cache is None else cache[name]
            with nn.intercept_methods(functools.partial(_inside_block, layer, tap)):
                grown[name], x_SxLxD = model.blocks[layer](x_SxLxD, positions_SxL, before, mask_SxLxC)
            x_SxLxD = tap(Site("resid_post", layer), x_SxLxD)
        return x_SxLxD

    with matmul_precision(dtype):
        x_SxLxD = gemma.module.apply({"params": gemma.params}, x_SxLxD, method=through)
    if missed := (set(read) | write.keys()) - passed:
        raise InputError(
            f"blocks {layers.start} to {layers.stop - 1} do not contain {', '.join(map(str, missed))}"
        )
    return x_SxLxD, values, grown


def _inside_block(
    layer: int,
    tap: Callable[[Site, jax.Array], jax.Array],
    call: Callable,
    args: tuple,
    kwargs: dict,
    context: nn.module.InterceptorContext,
) -> object:
    """A Flax interceptor that taps the sites inside a block.

    It is safe because there is no `nn.jit` between the walk and the block's modules.
    """
    module = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if module.name == "attn_vec_einsum":
        equation, heads_SxLxNxH = args
        shape = heads_SxLxNxH.shape
        z_SxLxD = tap(Site("attn_out", layer), heads_SxLxNxH.reshape(*shape[:2], -1))
        return call(equation, z_SxLxD.reshape(shape), **kwargs)
    if isinstance(module, gm.nn.RMSNorm):
        match module.name:
            case "pre_ffw_norm":
                value = float32_norm(args[0], module, functools.partial(tap, Site("mlp_in_gain_free", layer)))
                return tap(Site("mlp_in", layer), value)
            case "post_ffw_norm":
                return tap(Site("mlp_out", layer), float32_norm(args[0], module))
        return float32_norm(args[0], module)
    return call(*args, **kwargs)


def read_sites(gemma: Gemma, tokens_SxL: jax.Array, sites: Sequence[Site]) -> dict[Site, jax.Array]:
    """The activations [S, L, D] of `sites`. Blocks after the deepest site are not computed and need no weights."""
    x_SxLxD = embed(gemma, tokens_SxL)
    return run_blocks(gemma, x_SxLxD, tokens_SxL, range(blocks_needed(sites)), read=sites)[1]
