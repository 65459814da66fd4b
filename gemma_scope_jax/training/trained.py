"""A run that has been trained, as a value: its SAEs, its log, its config."""

import dataclasses
import functools
import pathlib
import typing

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.runtime import extras
from gemma_scope_jax.runtime.errors import RunError
from gemma_scope_jax.saes import loading
from gemma_scope_jax.training import export, metrics_log

if typing.TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run directory."""

    path: pathlib.Path

    @functools.cached_property
    def config(self) -> config_lib.Config:
        """What it was trained with."""
        return loading.run_config(self.path)

    @functools.cached_property
    def saes(self) -> dict[str, loading.LoadedSAE]:
        """Its SAEs by name, on raw activations; of a run under way those of its newest checkpoint.

        Raises:
          ValueError: the run has no checkpoint yet.
        """
        export.refresh(self.path)
        if not (self.path / "sae").is_dir():
            raise RunError(f"{self.path} has no checkpoint yet; train it on")
        return {one.name: one for one in loading.read(self.path / "sae" / "*")}

    @property
    def sae(self) -> loading.LoadedSAE:
        """The only SAE.

        Raises:
          ValueError: there are several.
        """
        if len(self.saes) > 1:
            raise RunError(f"{self.path} has several SAEs; choose one of saes: {', '.join(self.saes)}")
        return next(iter(self.saes.values()))

    @property
    def metrics(self) -> "pandas.DataFrame":
        """What was logged: a row for each step and SAE."""
        with extras.needed():
            import pandas

        rows = []
        for entry in metrics_log.read_metrics(self.path):
            of_step = {key: value for key, value in entry.items() if key != "sae"}
            rows += [{**of_step, "sae": name, **numbers} for name, numbers in entry["sae"].items()]
        return pandas.DataFrame(rows)
