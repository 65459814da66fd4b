"""How often and how strongly latents fire on held-out text: the measure of what is much and what is little."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gemma_scope_jax.analysis.dashboards import collect
from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.data import batching
from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.saes import attached, jumprelu
from gemma_scope_jax.saes.attached import alone

ROWS = 64  # Of held-out text, unless more or fewer are asked for: a rare latent fires a few dozen times.
# Of what dashboards gather only the sums are wanted.
_LEAST = collect.Options(top=1, sample=1, before=1, after=0)


@dataclasses.dataclass(frozen=True)
class Activity:
    """Of each of an SAE's latents; 0 of one that never fired."""

    sae: str
    rows: int  # of held-out text
    frequency_M: np.ndarray  # the share of activations on which it fires
    mean_M: np.ndarray  # its activation where it fires
    largest_M: np.ndarray


def activity(scope: Scope, rows: int = ROWS, names: Sequence[str] = ()) -> dict[str, Activity]:
    """Measures the latents of all SAEs, or those named, in the same passes over held-out rows.

    Args:
      scope: the model and the SAEs.
      rows: so many, in the order of an evaluation; at most all.
      names: of SAEs; of none, all.

    Raises:
      ValueError: there is no such SAE or no row.
    """
    for name in names:
        scope.check_latent(name, 0)
    subjects = {name: subject for name, subject in scope.subjects.items() if not names or name in names}
    gathered = _gather(scope, subjects, rows, scope.placed)
    return {
        name: Activity(name, g.rows, g.frequency_M, g.mean_M, np.where(g.is_dead_M, 0, g.max_M))
        for name, g in gathered.items()
    }


def _gather(
    scope: Scope,
    subjects: Mapping[str, attached.Subject],
    rows: int,
    placed: Mapping[str, jumprelu.SAE] | None = None,
) -> dict[str, collect.Gathered]:
    ranges.check("rows", rows, ranges.COUNT)
    per_batch, counts = scope.config.evaluation.rows_per_batch, batching.counts_of(scope.config)
    return collect.gather(
        scope.gemma,
        subjects,
        scope.held_out(),
        rows,
        per_batch,
        counts,
        _LEAST,
        placed=placed,
    )


def typical(scope: Scope, name: str, latent: int, rows: int = ROWS) -> float:
    """A latent's mean activation where it fires on so many held-out rows, the unit in which it is changed.

    Raises:
      ValueError: there is no such SAE or latent, or it never fired there.
    """
    scope.check_latent(name, latent)
    found = _gather(scope, {name: alone(scope.subjects[name], [latent])}, rows)[name]
    if not found.count_M[0]:
        raise InputError(
            f"latent {latent} of {name} fires nowhere on {found.rows} held-out rows, so none knows what is much for "
            "it; measure on more rows, or choose another"
        )
    return float(found.mean_M[0])
