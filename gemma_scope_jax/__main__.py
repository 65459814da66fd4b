"""python -m gemma_scope_jax COMMAND"""

import argparse
import pathlib

from gemma_scope_jax import cli
from gemma_scope_jax.formats import WRITTEN as FORMATS


def main() -> None:
    """Parses the command line and runs one command."""
    parser = argparse.ArgumentParser(prog="python -m gemma_scope_jax")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the SAEs of a run in a format that other tools read")
    export.add_argument("run", type=pathlib.Path, help="a run directory")
    export.add_argument(
        "--format", default="saelens", help=f"of {', '.join(FORMATS)}; several with commas, or all"
    )
    export.add_argument("--bank", help="only this bank's SAEs (default: all)")
    convert = commands.add_parser("convert", help="write an SAE of a file in another format")
    convert.add_argument("sae", help="a path or hf://OWNER/NAME/FOLDER, in any format")
    convert.add_argument("--format", choices=FORMATS, required=True)
    convert.add_argument("--model", default="", help="if the file does not say it, for example gemma2_2b")
    convert.add_argument("--site", default="", help="likewise what it reads, for example layer_20_resid_post")
    convert.add_argument("--target_site", default="", help="likewise what a transcoder predicts")
    convert.add_argument(
        "--weights",
        default="",
        help="Gemma's, where formats differ in the gain that a transcoder reads behind",
    )
    for command in (export, convert):
        command.add_argument(
            "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrices"
        )
        command.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
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
    if fields and args.command in ("export", "convert"):
        parser.error(f"unrecognized arguments: {' '.join(fields)}")
    # Imported late: --help should not take seconds.
    if args.command == "export":
        from gemma_scope_jax import export as export_lib

        formats = FORMATS if args.format == "all" else tuple(args.format.split(","))
        if unknown := set(formats) - set(FORMATS):
            parser.error(
                f"--format: unknown {', '.join(sorted(unknown))}; choose of {', '.join(FORMATS)}, or all"
            )
        export_lib.export_run(args.run, formats, args.out, args.bank, args.dtype)
    elif args.command == "convert":
        from gemma_scope_jax import export as export_lib

        sites = {"model": args.model, "site": args.site, "target_site": args.target_site}
        export_lib.convert(args.sae, args.format, args.out, args.dtype, args.weights, **sites)
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
