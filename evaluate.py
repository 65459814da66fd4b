"""Evaluates the SAEs of a run, or those in files of any format.

python evaluate.py RUN_OR_SAE [--rows=64]

On a slice of several hosts, the same command on each of them.
"""

import argparse

from gemma_scope_jax.cli import common
from gemma_scope_jax.runtime import ranges


def main() -> None:
    """Parses the command line, evaluates, and shows and stores the results."""
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_subject(parser)
    parser.add_argument("--rows", type=common.number(ranges.COUNT), help="how many to evaluate on")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out", help="which rows")
    parser.add_argument("--fast", action="store_true", dest="is_fast", help="without KL and r_L0")
    parser.add_argument(
        "--baselines",
        action="store_true",
        dest="has_baselines",
        help="beside each SAE its own top k, a random decoder, an untrained SAE and principal components",
    )
    parser.add_argument(
        "--text",
        action="append",
        help="to evaluate on, as in config.data.text; several, each SOURCE or NAME=SOURCE, with a table by text",
    )
    parser.add_argument(
        "--turns", choices=("all", "user", "model"), help="in the chat template, whose turns count"
    )
    args = parser.parse_args()
    common.check_outputs(args)
    from gemma_scope_jax.cli import evaluate
    from gemma_scope_jax.runtime import distributed  # Imported late: --help should not take seconds.

    distributed.initialize()
    evaluate.evaluate_path(**vars(args))


if __name__ == "__main__":
    common.run(main, "the same command goes on after the last whole batch")
