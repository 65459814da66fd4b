"""Trains a bank of sparse autoencoders, or continues a run.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.field=value ...]

On a slice of several hosts, the same command on each of them; see docs/pods.md.
"""

import argparse
import dataclasses

from gemma_scope_jax.cli import common


def main() -> None:
    """Parses the command line and trains."""
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="the run's config file")
    parser.add_argument(
        "--workdir",
        required=True,
        type=common.path,
        help="the run's directory; an unfinished run is continued",
    )
    args, fields = parser.parse_known_args()
    common.check_outputs(args)
    values = common.read_config(args.config, fields)
    # Imported late: a mistyped flag should not cost the seconds that JAX and Gemma take.
    from gemma_scope_jax import config
    from gemma_scope_jax.runtime import distributed
    from gemma_scope_jax.training import loop

    made = config.from_dict(values)
    distributed.initialize(**dataclasses.asdict(made.hosts), saves_together=True)
    loop.train(made, args.workdir)


if __name__ == "__main__":
    common.run(main, "nothing has been trained yet")
