"""A trained run as a Python object: its SAEs, its log and its config."""

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
    """A run directory, with its config, SAEs and log."""

    path: pathlib.Path

    @functools.cached_property
    def config(self) -> config_lib.Config:
        """The config that the run was trained with."""
        return loading.run_config(self.path)

    @functools.cached_property
    def saes(self) -> dict[str, loading.LoadedSAE]:
        """The run's SAEs by name, on raw activations; those of the newest checkpoint if the run is unfinished.

        Raises:
          ValueError: if the run has no checkpoint yet.
        """
        export.refresh(self.path)
        if not (self.path / "sae").is_dir():
            raise RunError(f"{self.path} has no checkpoint yet; continue training")
        return {one.name: one for one in loading.read(self.path / "sae" / "*")}

    @property
    def sae(self) -> loading.LoadedSAE:
        """The SAE of a run with one SAE.

        Raises:
          ValueError: if the run has several SAEs.
        """
        if len(self.saes) > 1:
            raise RunError(f"{self.path} has several SAEs; choose one of saes: {', '.join(self.saes)}")
        return next(iter(self.saes.values()))

    @property
    def metrics(self) -> "pandas.DataFrame":
        """The training log, with a row for each step and SAE."""
        with extras.needed():
            import pandas

        rows = []
        for entry in metrics_log.read_metrics(self.path):
            of_step = {key: value for key, value in entry.items() if key != "sae"}
            rows += [{**of_step, "sae": name, **numbers} for name, numbers in entry["sae"].items()]
        return pandas.DataFrame(rows)
