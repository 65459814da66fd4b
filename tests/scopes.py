"""Builds scopes in memory from a model and SAEs; `analysis.open_scope` builds them from files."""

from collections.abc import Mapping

import jax
import numpy as np
import tiny
import toys

from gemma_scope_jax import analysis, config
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.saes import attached


def make(
    gemma: Gemma,
    subjects: Mapping[str, attached.Subject],
    mesh: jax.sharding.Mesh | None = None,
    frequency: Mapping[str, np.ndarray] | None = None,
    held_out: np.ndarray | None = None,
    rows_per_batch: int = 4,
) -> analysis.Scope:
    """A scope with the held-out rows `held_out` [S, L], or without a text if it is None."""
    gemma = gemma.replace(mesh=mesh or gemma.mesh)
    return analysis.Scope(
        config.from_dict({"model": "tiny", "evaluation": {"rows_per_batch": rows_per_batch}}),
        gemma,
        tiny.load_tokenizer(),
        subjects,
        {name: attached.place(gemma.mesh, subject.sae) for name, subject in subjects.items()},
        frequency or {},
        analysis.Scope.held_out if held_out is None else lambda: toys.Rows(held_out),
    )
