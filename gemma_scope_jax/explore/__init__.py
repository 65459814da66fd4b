"""Looking inside the model: what latents fire on, and what they do."""

from gemma_scope_jax.explore.edits import Edit, ablate, add, clamp, scale
from gemma_scope_jax.explore.flow import Flow, flow
from gemma_scope_jax.explore.links import Links, links
from gemma_scope_jax.explore.reading import Reading, read
from gemma_scope_jax.explore.scope import Scope, open_scope

__all__ = [
    "Edit",
    "Flow",
    "Links",
    "Reading",
    "Scope",
    "ablate",
    "add",
    "clamp",
    "flow",
    "links",
    "open_scope",
    "read",
    "scale",
]
