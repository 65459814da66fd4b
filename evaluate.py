"""Evaluates the SAEs of a run, or those in files of any format.

python evaluate.py RUN_OR_SAE [--rows=64]

On a slice of several hosts, the same command on each of them.
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
        "path",
        help="a run directory; or a path or hf://OWNER/NAME/FOLDER of an SAE in any format, or of several with *",
    )
    parser.add_argument("--rows", type=int, help="how many to evaluate on")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out", help="which rows")
    parser.add_argument("--fast", action="store_true", dest="is_fast", help="without KL and r_L0")
    parser.add_argument("--rows_per_batch", type=int, help="rows in one pass of the model")
    parser.add_argument(
        "--baselines",
        action="store_true",
        dest="has_baselines",
        help="beside each SAE its own top k, a random decoder, an untrained SAE and principal components",
    )
    other = parser.add_argument_group("where it shall be another than the run or the file says")
    other.add_argument(
        "--text",
        action="append",
        help="to evaluate on, as in config.data.text; several, each SOURCE or NAME=SOURCE, with a table by text",
    )
    other.add_argument(
        "--turns", choices=("all", "user", "model"), help="in the chat template, whose turns count"
    )
    other.add_argument("--model", help="for example gemma2_2b-it")
    other.add_argument("--weights", help="Gemma's, as in config.weights")
    other.add_argument("--tokenizer", help="Gemma's, as in config.tokenizer")
    other.add_argument("--dtype", choices=("float32", "bfloat16"), help="Gemma's")
    files = parser.add_argument_group("of SAEs in files that do not say it")
    files.add_argument("--site", help="what is read, for example layer_20_resid_post")
    files.add_argument("--target_site", help="what a transcoder predicts, for example layer_20_mlp_out")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results (default: the path)")
    args = parser.parse_args()
    from gemma_scope_jax import config, hosts, report  # Imported late: --help should not take seconds.

    hosts.initialize(config.HostsConfig().heartbeat_timeout_seconds)
    report.evaluate_path(**vars(args))


if __name__ == "__main__":
    cli.run(main)
