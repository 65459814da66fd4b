"""The parser of all commands of `python -m gemma_scope_jax`, and which function each calls."""

import argparse
import sys

from gemma_scope_jax.cli import analysis, common
from gemma_scope_jax.cli.common import say
from gemma_scope_jax.runtime import ranges, signals
from gemma_scope_jax.runtime.ranges import COUNT, SEED
from gemma_scope_jax.saes import formats

# What is lost, or how it goes on, when a signal ends a command.
_WHEN_INTERRUPTED = {
    "dashboards": "the same command goes on after what was kept last",
    "prepare": "the same command goes on after the last whole part",
    "generate": "replies are written when all are there",
    "detect": "detection writes its results when it ends",
    "probe": "probing writes its results when it ends",
    "contrast": "a contrast writes its results when it ends",
}


def _parser() -> argparse.ArgumentParser:
    parser = common.Parser(prog="python -m gemma_scope_jax")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the SAEs of a run in a format that other tools read")
    export.add_argument("run", type=common.path, help="a run directory")
    export.add_argument(
        "--format", default="saelens", help=f"of {', '.join(formats.written())}; several with commas, or all"
    )
    export.add_argument("--bank", help="only this bank's SAEs (default: all)")
    convert = commands.add_parser("convert", help="write an SAE of a file in another format")
    convert.add_argument("sae", help="a path or hf://OWNER/NAME/FOLDER, in any format")
    convert.add_argument("--format", choices=formats.written(), required=True)
    convert.add_argument(
        "--model", default="", help="if the file does not say it or is wrong, for example gemma2_2b"
    )
    convert.add_argument("--site", default="", help="likewise what it reads, for example layer_20_resid_post")
    convert.add_argument("--target_site", default="", help="likewise what a transcoder predicts")
    convert.add_argument(
        "--weights",
        default="",
        help="Gemma's, where formats differ in the gain that a transcoder reads behind",
    )
    publish = commands.add_parser("publish", help="write, and perhaps upload, a repository of a run's SAEs")
    publish.add_argument("run", type=common.path, help="the directory of a run that has been evaluated")
    publish.add_argument("--repo", required=True, help="OWNER/NAME on Hugging Face's hub")
    publish.add_argument(
        "--format",
        choices=[name for name, one in formats.FORMATS.items() if one.is_published],
        default="saelens",
    )
    publish.add_argument(
        "--license", default="", help="that you choose for your SAEs, as the hub calls it, such as cc-by-4.0"
    )
    publish.add_argument("--push", action="store_true", help="upload it, too")
    compare = commands.add_parser("compare", help="evaluations side by side, each compared with the first")
    compare.add_argument(
        "folders", nargs="+", type=common.path, help="what evaluate.py was given, or its --out"
    )
    compare.add_argument("--out", type=common.path, required=True, help="folder to write to")
    analysis.add_commands(commands)
    for command in (export, convert, publish):
        command.add_argument(
            "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrices"
        )
        command.add_argument("--out", type=common.path, required=True, help="folder to write to")
    probe = commands.add_parser(
        "probe", help="how well a few latents tell the classes of labelled texts apart"
    )
    probe.add_argument(
        "--labelled",
        type=common.path,
        required=True,
        help='a .jsonl file of a "text" and a "label" each, and perhaps a "group" that is not to be divided',
    )
    probe.add_argument(
        "--seed", type=common.number(SEED), default=0, help="of the split into training and test texts"
    )
    detect = commands.add_parser(
        "detect", help="whether what a latent's strongest passages share tells where else it fires"
    )
    detect.add_argument("--text", help="another than the run's, as in config.data.text")
    detect.add_argument("--rows", type=common.number(COUNT), help="held-out rows")
    detect.add_argument(
        "--latents", type=common.number(COUNT), default=100, help="so many of each SAE are scored"
    )
    detect.add_argument(
        "--seed", type=common.number(SEED), default=0, help="of the latents and positions that are drawn"
    )
    for command in (probe, detect):
        common.add_subject(command)
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
    prepare.add_argument(
        "--workers", type=common.number(ranges.FEW), help="processes (default: as many as there are cores)"
    )
    generate = commands.add_parser("generate", help="have Gemma go on with, or answer, the texts of a file")
    generate.add_argument("--model", required=True, help="for example gemma2_2b-it")
    generate.add_argument("--weights", default="", help="Gemma's, as in config.weights")
    generate.add_argument("--tokenizer", default="", help="Gemma's, as in config.tokenizer")
    generate.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="Gemma's")
    generate.add_argument(
        "--prompts", type=common.path, required=True, help='a file of texts: .jsonl with {"text": …} a line'
    )
    generate.add_argument("--chat", action="store_true", help="each text is a user's turn, to be answered")
    generate.add_argument(
        "--num_tokens", type=common.number(ranges.NEW_TOKENS), default=128, help="the most for one prompt"
    )
    generate.add_argument(
        "--temperature",
        type=common.number(ranges.POSITIVE_OR_ZERO, float),
        default=1.0,
        help="of the draws; 0: the likeliest token",
    )
    generate.add_argument("--seed", type=common.number(SEED), default=0, help="of the draws")
    generate.add_argument(
        "--rows_per_batch", type=common.number(COUNT), default=16, help="prompts run together"
    )
    generate.add_argument("--out", type=common.path, required=True, help="file to write, .jsonl")
    return parser


def main() -> None:
    """Parses the command line and runs one command."""
    parser = _parser()
    args, fields = parser.parse_known_args()
    if args.command == "steer":  # Of prompts argparse leaves over those that stand behind options.
        args.prompts = [*args.prompts, *(text for text in fields if not text.startswith("-"))]
        fields = [text for text in fields if text.startswith("-")]
    signals.leaving(_WHEN_INTERRUPTED.get(args.command, ""))
    options = {name: value for name, value in vars(args).items() if name not in ("command", "call")}
    if fields and args.command not in ("plan", "prepare"):
        parser.error(f"unrecognized arguments: {' '.join(fields)}")
    common.check_outputs(args)
    # Imported late: --help should not take seconds.
    if "call" in args:
        args.call(**options)
    elif args.command == "export":
        from gemma_scope_jax.training import export as export_lib

        chosen = formats.written() if args.format == "all" else tuple(args.format.split(","))
        if unknown := set(chosen) - set(formats.written()):
            parser.error(
                f"--format: unknown {', '.join(sorted(unknown))}; choose of {', '.join(formats.written())}, or all"
            )
        for place in export_lib.export_run(args.run, chosen, args.out, args.bank, args.dtype):
            say(f"Exported {place}")
    elif args.command == "convert":
        from gemma_scope_jax.saes import saving

        sites = {"model": args.model, "site": args.site, "target_site": args.target_site}
        for place in saving.convert(args.sae, args.format, args.out, args.dtype, args.weights, **sites):
            say(f"Wrote {place}")
    elif args.command == "publish":
        from gemma_scope_jax.training import publish as publish_lib

        publish_lib.publish(args.run, args.out, args.repo, args.license, args.format, args.dtype, args.push)
    elif args.command == "compare":
        from gemma_scope_jax.evaluation import side_by_side

        side_by_side.compare(args.folders, args.out)
    elif args.command == "probe":
        from gemma_scope_jax.evaluation import probing

        probing.probe_path(**options)
    elif args.command == "detect":
        from gemma_scope_jax.evaluation import detection

        detection.detect_path(**options)
    elif args.command == "prepare":
        from gemma_scope_jax import config
        from gemma_scope_jax.data import prepare as prepare_lib
        from gemma_scope_jax.data import token_rows

        chosen = config.from_dict(common.read_config(args.config, fields))
        config.check_ranges(chosen)
        rows = token_rows.open_rows(prepare_lib.rows_of(chosen, args.workers), token_rows.TRAIN)
        print(f"{len(rows):,} rows to train on in {rows.folder}.")
    elif args.command == "generate":
        from gemma_scope_jax import config
        from gemma_scope_jax.cli import generate as generate_lib

        names = {"model": args.model, "weights": args.weights, "tokenizer": args.tokenizer}
        generate_lib.write_rollouts(
            config.from_dict(names | {"gemma_dtype": args.dtype}),
            args.prompts,
            args.out,
            args.num_tokens,
            args.temperature,
            args.seed,
            args.chat,
            args.rows_per_batch,
        )
    else:
        common.find_tpu_compiler()
        from gemma_scope_jax import config
        from gemma_scope_jax.training import forecast

        chosen = config.from_dict(common.read_config(args.config, fields))
        if not forecast.show(forecast.forecast(chosen, args.topology)):
            sys.exit(1)
