"""python -m gemma_scope_jax COMMAND"""

import argparse
import pathlib

from gemma_scope_jax import cli


def main() -> None:
    """Parses the command line and runs one command."""
    parser = argparse.ArgumentParser(prog="python -m gemma_scope_jax")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the SAEs of a run in a format that other tools read")
    export.add_argument("run", type=pathlib.Path, help="a run directory")
    export.add_argument("--format", choices=("saelens", "gemma_scope", "gemma_scope_2"), default="saelens")
    export.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    args = parser.parse_args()
    from gemma_scope_jax import export as export_lib  # Imported late: --help should not take seconds.

    export_lib.export_run(args.run, args.format, args.out)


if __name__ == "__main__":
    cli.run(main)
