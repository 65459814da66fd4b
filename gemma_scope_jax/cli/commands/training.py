"""The commands that train, and what a run takes: `train`, `plan`, `prepare`.

Each imports what it runs when it runs: --help must not take seconds.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Annotated

import tyro

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.cli import common
from gemma_scope_jax.cli.options import MaybeFew, Place, Positional

Fields = Annotated[config_lib.Config, tyro.conf.arg(name="")]


def train_of(default: config_lib.Config) -> Callable[..., None]:
    """The command `train`, where the config named is `default`."""

    def train(config: Positional[str], workdir: Positional[Place], fields: Fields = default) -> None:
        """Train the SAEs of a config, or go on with a run that was interrupted.

        gemma-scope train quickstart runs/quickstart

        gemma-scope train gemma2_2b:mlp_out_65k runs/2b --banks.main.layers 5 12 --train.batch 8192

        Args:
          config: quickstart, quickstart_banks, gemma2_2b, gemma2_9b, gemma2_9b_it, gemma2_27b or gemma3, some with a
            suite behind a colon; or a config file.
          workdir: the run's folder.
          fields: of the config.
        """
        del config
        common.check_outputs(workdir=workdir)
        from gemma_scope_jax.runtime import distributed
        from gemma_scope_jax.training import loop

        distributed.initialize(**dataclasses.asdict(fields.hosts), saves_together=True)
        loop.train(fields, workdir)

    return train


def plan_of(default: config_lib.Config) -> Callable[..., None]:
    """The command `plan`, where the config named is `default`."""

    def plan(config: Positional[str], topology: Positional[str], fields: Fields = default) -> None:
        """Say what a run needs, and how long it takes at peak rates, on a TPU slice; it takes no TPU.

        gemma-scope plan gemma2_2b:resid_post_16k v5e:2x4 --banks.main.layers 12

        Args:
          config: a config's name or file, as for train.
          topology: the slice, as in v5e:2x4 or v5p:2x2x4.
          fields: of the config.
        """
        del config
        common.find_tpu_compiler()
        from gemma_scope_jax.training import forecast

        if not forecast.show(forecast.forecast(fields, topology)):
            sys.exit(1)

    return plan


def prepare_of(default: config_lib.Config) -> Callable[..., None]:
    """The command `prepare`, where the config named is `default`."""

    def prepare(config: Positional[str], workers: MaybeFew = None, fields: Fields = default) -> None:
        """Tokenise and pack a run's text, in parallel; it goes on where it was interrupted.

        gemma-scope prepare gemma2_2b --workers 32

        Args:
          config: a config's name or file, as for train.
          workers: processes; by default as many as there are cores.
          fields: of the config.
        """
        del config
        from gemma_scope_jax.data import prepare as prepare_lib
        from gemma_scope_jax.data import token_rows

        config_lib.check_ranges(fields)
        rows = token_rows.open_rows(prepare_lib.rows_of(fields, workers), token_rows.TRAIN)
        common.say(f"{len(rows):,} rows to train on in {rows.folder}.")

    return prepare
