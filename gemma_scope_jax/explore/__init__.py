"""Looking inside the model: what latents fire on, and what they do."""

from gemma_scope_jax.explore.ablating import Ablations, ablations, ablations_of_prompts
from gemma_scope_jax.explore.attribution import Attribution, attribute
from gemma_scope_jax.explore.edits import Edit, ablate, add, clamp, scale
from gemma_scope_jax.explore.integrated import integrate
from gemma_scope_jax.explore.reading import Reading, read
from gemma_scope_jax.explore.scope import Scope, open_scope

__all__ = [
    "Ablations",
    "Attribution",
    "Edit",
    "Reading",
    "Scope",
    "ablate",
    "ablations",
    "ablations_of_prompts",
    "add",
    "attribute",
    "clamp",
    "integrate",
    "open_scope",
    "read",
    "scale",
]
