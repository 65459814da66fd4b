"""Analyses of a model with its SAEs: what latents fire on, and what they do."""

from gemma_scope_jax.analysis.attribution.ablation import Ablations, ablations, ablations_of_prompts
from gemma_scope_jax.analysis.attribution.gradients import Attribution, attribute
from gemma_scope_jax.analysis.attribution.integrated_gradients import integrate
from gemma_scope_jax.analysis.contrasts.correction import Correction, behaviour, correct
from gemma_scope_jax.analysis.contrasts.find import Contrast, contrast
from gemma_scope_jax.analysis.contrasts.halves import halves
from gemma_scope_jax.analysis.latent_statistics import Activity, activity, typical
from gemma_scope_jax.analysis.layers.flow import Flow, flow
from gemma_scope_jax.analysis.layers.links import Links, links
from gemma_scope_jax.analysis.one_latent import Look, look_at
from gemma_scope_jax.analysis.prompt_activations import Reading, read
from gemma_scope_jax.analysis.session import Scope, open_scope
from gemma_scope_jax.analysis.steering.edits import Edit, ablate, add, clamp, scale
from gemma_scope_jax.analysis.steering.steer import Steered, steer
from gemma_scope_jax.analysis.steering.sweep import Sweep, sweep

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
