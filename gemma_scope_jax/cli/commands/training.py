"""The commands that train, prepare a run's data and plan its needs: `train`, `prepare`, `plan`.

Each imports its libraries when it runs, so that --help is fast.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Annotated

import tyro

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.cli import common
from gemma_scope_jax.cli.options import ConfigName, MaybeFew, MaybePrice, Positional, Run, Topology

Fields = Annotated[config_lib.Config, tyro.conf.arg(name="")]


def train_of(default: config_lib.Config) -> Callable[..., None]:
    """Returns the command `train` with the defaults of a config."""

    def train(config: Positional[ConfigName], workdir: Positional[Run], fields: Fields = default) -> None:
        """Train the SAEs of a config, or continue an interrupted run.

        gemma-scope train quickstart runs/quickstart

        gemma-scope train gemma2_2b:mlp_out_65k runs/2b --banks.main.layers 5 12 --train.batch 8192

        Args:
          config: quickstart, quickstart_banks, gemma2_2b, gemma2_9b, gemma2_9b_it, gemma2_27b or gemma3.
            Some have suites, as in gemma2_2b:mlp_out_65k. Or the path of a config file.
          workdir: folder of the run; a run that is there already is continued.
          fields: fields of the config to change.
        """
        del config
        common.check_outputs(workdir=workdir)
        from gemma_scope_jax.runtime import distributed
        from gemma_scope_jax.training import loop

        distributed.initialize(**dataclasses.asdict(fields.hosts), saves_together=True)
        loop.train(fields, workdir)
        if distributed.is_first():
            common.suggest(["evaluate", workdir])

    return train


def plan_of(default: config_lib.Config) -> Callable[..., None]:
    """Returns the command `plan` with the defaults of a config."""

    def plan(
        config: Positional[ConfigName],
        topology: Positional[Topology],
        dollars_per_chip_hour: MaybePrice = None,
        fields: Fields = default,
    ) -> None:
        """Predict a run's memory on a TPU slice, its time at peak rates and its price; no TPU is needed.

        gemma-scope plan gemma2_2b:resid_post_16k v5e-8 --banks.main.layers 12

        Args:
          config: name of a config or path of a config file, as for train.
          topology: TPU slice by Cloud's name, such as v5e-8 or v5p-32, or its shape, such as v5e:2x4 or v5p:2x2x4.
          dollars_per_chip_hour: price of one chip for an hour, in dollars, to print what the run costs.
          fields: fields of the config to change.
        """
        del config
        common.find_tpu_compiler()
        from gemma_scope_jax.cli import plan as plan_lib
        from gemma_scope_jax.training import forecast

        if not plan_lib.show(forecast.forecast(fields, topology), dollars_per_chip_hour):
            sys.exit(1)

    return plan


def prepare_of(default: config_lib.Config) -> Callable[..., None]:
    """Returns the command `prepare` with the defaults of a config."""

    def prepare(config: Positional[ConfigName], workers: MaybeFew = None, fields: Fields = default) -> None:
        """Tokenise and pack a run's text in parallel, or continue where this was interrupted.

        gemma-scope prepare gemma2_2b --workers 32

        Args:
          config: name of a config or path of a config file, as for train.
          workers: number of processes; by default the number of cores.
          fields: fields of the config to change.
        """
        del config
        from gemma_scope_jax.data import prepare as prepare_lib
        from gemma_scope_jax.data import token_rows

        config_lib.check_ranges(fields)
        rows = token_rows.open_rows(prepare_lib.rows_of(fields, workers), token_rows.TRAIN)
        common.say(f"{len(rows):,} training rows are in {rows.folder}.")

    return prepare
