"""Evaluates the SAEs of a run, or one exported SAE.

python evaluate.py RUN_OR_SAE [--rows=64]
"""

import argparse
import pathlib

from gemma_scope_jax import cli


def main() -> None:
    """Parses the command line, evaluates, and shows and stores the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=pathlib.Path, help="a run directory, or the folder of an exported SAE")
    parser.add_argument("--rows", type=int, help="held-out rows to evaluate on")
    parser.add_argument("--rows_per_batch", type=int, help="rows in one pass of the model")
    parser.add_argument("--text", help="text to evaluate an exported SAE on, as in config.data.text")
    parser.add_argument("--weights", help="Gemma's weights for an exported SAE, as in config.weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="Gemma's dtype for an exported SAE")
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder for evaluation.json and .png (default: the path)"
    )
    args = parser.parse_args()
    from gemma_scope_jax import report  # Imported late: --help should not take seconds.

    report.evaluate_path(**vars(args))


if __name__ == "__main__":
    cli.run(main)
