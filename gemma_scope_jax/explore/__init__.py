"""Looking inside the model: what latents fire on, and what they do."""

from gemma_scope_jax.explore.audit import halves
from gemma_scope_jax.explore.contrast import Contrast, contrast
from gemma_scope_jax.explore.correction import Correction, behaviour, correct
from gemma_scope_jax.explore.edits import Edit, ablate, add, clamp, scale
from gemma_scope_jax.explore.reading import Reading, read
from gemma_scope_jax.explore.scope import Scope, open_scope

__all__ = [
    "Contrast",
    "Correction",
    "Edit",
    "Reading",
    "Scope",
    "ablate",
    "add",
    "behaviour",
    "clamp",
    "contrast",
    "correct",
    "halves",
    "open_scope",
    "read",
    "scale",
]
