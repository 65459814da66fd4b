"""Where activations are read and written: a layer and a place in its block."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import quoted


class SiteNames(NamedTuple):
    """The names that other libraries use for a kind of site; `{}` is the layer."""

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
    `mlp_out`: the MLP's output, after the post-norm.
    `attn_out`: the heads' outputs, concatenated, before the output projection.
    `mlp_in`: the MLP's input, after the pre-norm; `mlp_in_gain_free`: the same before the norm's gain.
    `embed`: the residual stream before layer 0, the token embeddings times √D.
    """

    kind: str
    layer: int

    def __str__(self) -> str:
        return "embed" if self.kind == "embed" else f"layer_{self.layer}_{self.kind}"


def check_site(model: gm.nn.Transformer, site: Site) -> None:
    """Raises ValueError if the model has no such site."""
    if site.kind not in SITES:
        raise InputError(f"unknown site {quoted(site.kind)}; choose one of {', '.join(SITES)}")
    if site.kind == "embed" and site.layer != 0:
        raise InputError(f"the site embed is in layer 0, not in layer {site.layer}")
    layers = model.config.num_layers
    if not 0 <= site.layer < layers:
        raise InputError(
            f"layer {site.layer} is out of range: {type(model).__name__} has layers 0 to {layers - 1}"
        )


def blocks_needed(sites: Collection[Site]) -> int:
    """The number of blocks up to the deepest of some sites."""
    return max((0 if site.kind == "embed" else site.layer + 1) for site in sites)


def site_from_hook(name: str) -> Site:
    """The site with this name in TransformerLens, in Hugging Face or in this package."""
    # In a model with a vision tower, the text model's modules have one of two prefixes.
    bare = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
    for kind, names in SITES.items():
        own = "embed" if kind == "embed" else f"layer_{{}}_{kind}"
        # A module's name alone means its output, as in SAELens.
        for form in (*names, own, names.hugging_face.removesuffix(".output")):
            pattern = re.escape(form).replace(r"\{\}", r"(\d{1,4})")
            if form and (match := re.fullmatch(pattern, bare)):
                return Site(kind, int(match[1]) if match.groups() else 0)
    raise InputError(f"unknown site {quoted(name)}; give a name such as layer_9_resid_post")


def site_width(model: gm.nn.Transformer, site: Site) -> int:
    """The width D of a site's activations."""
    config = model.config
    return config.num_heads * config.head_dim if site.kind == "attn_out" else config.embed_dim
