"""Evaluates the SAEs of a run, or one in a file of any format.

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
    parser.add_argument(
        "path", help="a run directory, or a path or hf://OWNER/NAME/FOLDER of an SAE in any format"
    )
    parser.add_argument("--rows", type=int, help="held-out rows to evaluate on")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out", help="which rows")
    parser.add_argument("--fast", action="store_true", dest="is_fast", help="without KL and r_L0")
    parser.add_argument("--rows_per_batch", type=int, help="rows in one pass of the model")
    files = parser.add_argument_group(
        "of SAEs in files, where they do not say it themselves or it shall be another"
    )
    files.add_argument("--model", help="for example gemma2_2b")
    files.add_argument("--site", help="what is read, for example layer_20_resid_post")
    files.add_argument("--target_site", help="what a transcoder predicts, for example layer_20_mlp_out")
    files.add_argument("--text", help="to evaluate on, as in config.data.text")
    files.add_argument("--weights", help="Gemma's, as in config.weights")
    files.add_argument("--tokenizer", help="Gemma's, as in config.tokenizer")
    files.add_argument("--dtype", choices=("float32", "bfloat16"), help="Gemma's")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results (default: the path)")
    args = parser.parse_args()
    from gemma_scope_jax import report  # Imported late: --help should not take seconds.

    report.evaluate_path(**vars(args))


if __name__ == "__main__":
    cli.run(main)
