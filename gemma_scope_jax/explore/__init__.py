"""Looking inside the model: what latents fire on, and what they do."""

from gemma_scope_jax.explore.ablating import Ablations, ablations, ablations_of_prompts
from gemma_scope_jax.explore.activities import Activity, activity, typical
from gemma_scope_jax.explore.attribution import Attribution, attribute
from gemma_scope_jax.explore.audit import halves
from gemma_scope_jax.explore.contrasts import Contrast, contrast
from gemma_scope_jax.explore.correction import Correction, behaviour, correct
from gemma_scope_jax.explore.edits import Edit, ablate, add, clamp, scale
from gemma_scope_jax.explore.flows import Flow, flow
from gemma_scope_jax.explore.integrated import integrate
from gemma_scope_jax.explore.linking import Links, links
from gemma_scope_jax.explore.looking import Look, look_at
from gemma_scope_jax.explore.reading import Reading, read
from gemma_scope_jax.explore.scope import Scope, open_scope
from gemma_scope_jax.explore.steering import Steered, steer
from gemma_scope_jax.explore.strengths import Sweep, sweep

__all__ = [
    "Ablations",
    "Activity",
    "Attribution",
    "Contrast",
    "Correction",
    "Edit",
    "Flow",
    "Links",
    "Look",
    "Reading",
    "Scope",
    "Steered",
    "Sweep",
    "ablate",
    "ablations",
    "ablations_of_prompts",
    "activity",
    "add",
    "attribute",
    "behaviour",
    "clamp",
    "contrast",
    "correct",
    "flow",
    "halves",
    "integrate",
    "links",
    "look_at",
    "open_scope",
    "read",
    "scale",
    "steer",
    "sweep",
    "typical",
]
