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
    export.add_argument("--bank", help="only this bank's SAEs (default: all)")
    export.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    plan = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="what a run would need and how long it would take on a TPU slice; no TPU is needed",
    )
    plan.add_argument("--config", required=True, help="a config file, as for train.py; likewise its fields")
    plan.add_argument("--topology", required=True, help="the slice, for example v5e:2x4 or v5p:2x2x4")
    prepare = commands.add_parser(
        "prepare",
        allow_abbrev=False,
        help="tokenise and pack a run's text, in parallel; goes on where it was interrupted",
    )
    prepare.add_argument(
        "--config", required=True, help="a config file, as for train.py; likewise its fields"
    )
    prepare.add_argument("--workers", type=int, help="processes (default: as many as there are cores)")
    args, fields = parser.parse_known_args()
    if fields and args.command == "export":
        parser.error(f"unrecognized arguments: {' '.join(fields)}")
    # Imported late: --help should not take seconds.
    if args.command == "export":
        from gemma_scope_jax import export as export_lib

        export_lib.export_run(args.run, args.format, args.out, args.bank)
    elif args.command == "prepare":
        if args.workers is not None and args.workers < 1:
            raise ValueError(f"--workers is {args.workers}; it must be at least 1")
        from gemma_scope_jax import config, data, runs

        chosen = config.from_dict(cli.read_config(args.config, fields))
        rows = data.open_rows(runs.prepare_rows(chosen, args.workers), data.TRAIN)
        print(f"{len(rows):,} rows to train on in {rows.folder}.")
    else:
        cli.find_tpu_compiler()
        from gemma_scope_jax import config, forecast

        chosen = config.from_dict(cli.read_config(args.config, fields))
        forecast.show(forecast.forecast(chosen, args.topology))


if __name__ == "__main__":
    cli.run(main)
