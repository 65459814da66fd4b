"""How often and how strongly latents fire on held-out text: the measure of what is much and what is little."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma_scope_jax import opening
from gemma_scope_jax.explore import dashboards, edits
from gemma_scope_jax.explore.scope import Scope

# Of what dashboards gather only the sums are wanted.
_LEAST = dashboards.Options(top=1, sample=1, before=1, after=0)


@dataclasses.dataclass(frozen=True)
class Activity:
    """Of each of an SAE's latents; 0 of one that never fired."""

    sae: str
    rows: int  # of held-out text
    frequency_M: np.ndarray  # the share of activations on which it fires
    mean_M: np.ndarray  # its activation where it fires
    largest_M: np.ndarray

    def typical(self, latent: int) -> float:
        """A latent's mean activation where it fires, the unit in which it is changed.

        Raises:
          ValueError: it never fired.
        """
        if not self.frequency_M[latent]:
            raise ValueError(
                f"latent {latent} of {self.sae} fires nowhere on {self.rows} held-out rows, so none knows what is "
                "much for it; measure on more rows, or choose another"
            )
        return float(self.mean_M[latent])


def activity(scope: Scope, rows: int = 16, names: Sequence[str] = ()) -> dict[str, Activity]:
    """Measures the latents of all SAEs, or those named, in the same passes over held-out rows.

    Args:
      scope: the model and the SAEs.
      rows: so many, in the order of an evaluation; at most all.
      names: of SAEs; of none, all.

    Raises:
      ValueError: there is no such SAE or no row.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")
    for name in names:
        edits.check_latent(scope, name, 0)
    subjects = {name: subject for name, subject in scope.subjects.items() if not names or name in names}
    gathered = dashboards.gather(
        scope.loaded,
        subjects,
        scope.held_out(),
        rows,
        scope.config.evaluation.rows_per_batch,
        opening.counts_of(scope.config),
        _LEAST,
        scope.mesh,
    )
    return {
        name: Activity(name, g.rows, g.frequency_M, g.mean_M, np.where(g.is_dead_M, 0, g.max_M))
        for name, g in gathered.items()
    }


def typical(scope: Scope, name: str, latent: int, rows: int = 16) -> float:
    """See `Activity.typical`; measured on so many held-out rows.

    Raises:
      ValueError: there is no such SAE or latent, or it never fired there.
    """
    edits.check_latent(scope, name, latent)
    return activity(scope, rows, [name])[name].typical(latent)
