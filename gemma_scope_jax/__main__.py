"""python -m gemma_scope_jax COMMAND"""

import argparse
import pathlib
import sys

from gemma_scope_jax import cli
from gemma_scope_jax.formats import PUBLISHED
from gemma_scope_jax.formats import WRITTEN as FORMATS


def _parser() -> argparse.ArgumentParser:
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
    publish.add_argument("run", type=pathlib.Path, help="the directory of a run that has been evaluated")
    publish.add_argument("--repo", required=True, help="OWNER/NAME on Hugging Face's hub")
    publish.add_argument("--format", choices=PUBLISHED, default="saelens")
    publish.add_argument("--license", default="cc-by-4.0", help="as the hub calls it")
    publish.add_argument("--push", action="store_true", help="upload it, too")
    compare = commands.add_parser("compare", help="evaluations side by side, each compared with the first")
    compare.add_argument(
        "folders", nargs="+", type=pathlib.Path, help="what evaluate.py was given, or its --out"
    )
    compare.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    explore = commands.add_parser("explore", help="which latents fire on a prompt, by token and SAE")
    explore.add_argument("path", help="a run directory, or SAEs in files, as for evaluate.py")
    explore.add_argument("text", help="the prompt")
    explore.add_argument("--top", type=int, default=5, help="latents of a token that are listed")
    explore.add_argument("--html", type=pathlib.Path, help="a page to write, too")
    flow = commands.add_parser("flow", help="a prompt through SAEs at many layers, with a logit lens")
    flow.add_argument("path", help="a run directory, or SAEs in files, as for evaluate.py")
    flow.add_argument("text", help="the prompt")
    flow.add_argument("--answer", help="the token that the lens follows, for example ' union'")
    flow.add_argument("--png", type=pathlib.Path, help="a picture to write, and beside it one of the lens")
    flow.add_argument("--html", type=pathlib.Path, help="a page to write")
    links = commands.add_parser("links", help="which latents of later SAEs a latent feeds")
    links.add_argument("path", help="a run directory, or SAEs in files, as for evaluate.py")
    links.add_argument("--sae", required=True, help="the latent's")
    links.add_argument("--latent", type=int, required=True)
    links.add_argument("--to", help="only this later SAE (default: all that are)")
    links.add_argument("--rows", type=int, default=8, help="of held-out text")
    links.add_argument("--prompt", help="in their place")
    links.add_argument("--top", type=int, default=20, help="latents that are listed")
    links.add_argument("--png", type=pathlib.Path, help="a picture to write")
    attribute = commands.add_parser(
        "attribute", help="which latents have a part in a prediction, and how much"
    )
    attribute.add_argument("path", help="a run directory, or SAEs in files, as for evaluate.py")
    attribute.add_argument("prompt", nargs="?", help="the text whose next token is predicted")
    attribute.add_argument(
        "--prompts", type=pathlib.Path, help='instead, a file of texts: .jsonl with {"text": …} a line'
    )
    attribute.add_argument("--answer", help="the token whose logit it is (default: the likeliest)")
    attribute.add_argument(
        "--against", help="the token whose logit is taken off, or mean, of all (default: the next likeliest)"
    )
    attribute.add_argument(
        "--token", type=int, default=-1, help="behind which token, from 0, or from the end below 0"
    )
    attribute.add_argument("--sae", help="of --integrated, where there are several")
    attribute.add_argument(
        "--integrated", action="store_true", dest="is_integrated", help="integrated gradients, of one SAE"
    )
    attribute.add_argument(
        "--ablate", type=int, default=0, help="take out so many latents, too, one by one, and compare"
    )
    attribute.add_argument("--seed", type=int, default=0, help="of the latents that are drawn for that")
    attribute.add_argument("--top", type=int, default=20, help="latents that are listed")
    attribute.add_argument("--html", type=pathlib.Path, help="a page to write, too")
    attribute.add_argument("--png", type=pathlib.Path, help="a picture to write, too")
    contrast = commands.add_parser(
        "contrast",
        help="which latents tell two sets of prompts apart, and what is left of a bias without them",
    )
    contrast.add_argument("path", help="a run directory, or SAEs in files, as for evaluate.py")
    for name in ("first", "second"):
        contrast.add_argument(
            f"--{name}", type=pathlib.Path, required=True, help="prompts: .txt with one a line, or .jsonl"
        )
    contrast.add_argument(
        "--at", choices=("mean", "max", "last"), default="mean", help="of a prompt's tokens"
    )
    contrast.add_argument("--rate", type=float, default=0.05, help="of false discoveries")
    contrast.add_argument(
        "--paired", action="store_true", dest="is_paired", help="line by line they are counterparts"
    )
    contrast.add_argument("--answer", help='a token whose logit is the behaviour, such as " she"')
    contrast.add_argument("--against", help="the token whose logit is taken off it")
    contrast.add_argument("--top", type=int, help="ablate only so many latents, the strongest")
    contrast.add_argument("--seed", type=int, default=0, help="of shuffles, halves and random sets")
    contrast.add_argument("--out", type=pathlib.Path, help="folder for contrast.json, .png, correction.json")
    for name in ("text", "model", "weights", "tokenizer", "site", "target_site"):
        contrast.add_argument(f"--{name}", help="as for evaluate.py")
    boards = commands.add_parser(
        "dashboards", help="pages of what each latent fires on, which need neither server nor network"
    )
    boards.add_argument("path", help="a run directory, or SAEs in files, as for evaluate.py")
    boards.add_argument("--rows", type=int, default=512, help="of held-out text to read")
    boards.add_argument("--rows_per_batch", type=int, help="in one pass of the model")
    boards.add_argument(
        "--sae", action="append", default=[], dest="saes", help="only this one; may be repeated"
    )
    boards.add_argument("--top", type=int, default=20, help="passages of a latent's strongest firings")
    boards.add_argument(
        "--neuronpedia", action="store_true", dest="is_for_neuronpedia", help="its batch files, too"
    )
    boards.add_argument("--out", type=pathlib.Path, help="folder to write to (default: the path/dashboards)")
    steer = commands.add_parser("steer", help="change latents, and see what Gemma then writes")
    steer.add_argument("path", help="a run directory, or SAEs in files, as for evaluate.py")
    steer.add_argument("prompts", nargs="*", help="to go on with")
    steer.add_argument(
        "--edit",
        action="append",
        required=True,
        help="NAME:LATENT and what becomes of it: =ablate, *0.5, +3t or =2t, t being its typical activation; perhaps "
        "@prompt, @reply or, of tokens from one up to another, @3:7. May be repeated; of one SAE without its name",
    )
    steer.add_argument("--num_tokens", type=int, default=40, help="the most for one prompt")
    steer.add_argument("--temperature", type=float, default=0.0, help="of the draws; 0: the likeliest token")
    steer.add_argument("--samples", type=int, default=1, help="replies to each prompt")
    steer.add_argument("--seed", type=int, default=0, help="of the draws")
    steer.add_argument("--chat", action="store_true", help="a prompt is a user's turn, to be answered")
    steer.add_argument("--html", type=pathlib.Path, help="a page to write, too")
    steer.add_argument(
        "--sweep",
        action="store_true",
        help="measure the edit NAME:LATENT+t, or =t, at several strengths instead",
    )
    steer.add_argument(
        "--strengths",
        type=_numbers,
        dest="multiples",
        help="of a sweep, so many times the edit each (default: -4,-2,-1,0,1,2,4,8)",
    )
    steer.add_argument(
        "--token",
        action="append",
        default=[],
        dest="tokens",
        help="of a sweep, one whose likelihood is looked at; may be repeated (default: what the decoder raises most)",
    )
    steer.add_argument("--png", type=pathlib.Path, help="a figure of the sweep to write, too")
    steer.add_argument("--rows", type=int, default=16, help="of held-out text to measure on")
    for name in ("text", "model", "weights", "tokenizer", "site", "target_site"):
        for command in (boards, steer):
            command.add_argument(f"--{name}", help="as for evaluate.py")
    for command in (export, convert, publish):
        command.add_argument(
            "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrices"
        )
        command.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    probe = commands.add_parser(
        "probe", help="how well a few latents tell the classes of labelled texts apart"
    )
    probe.add_argument(
        "--labelled",
        type=pathlib.Path,
        required=True,
        help='a .jsonl file of a "text" and a "label" each, and perhaps a "group" that is not to be divided',
    )
    probe.add_argument("--seed", type=int, default=0, help="of the split into training and test texts")
    detect = commands.add_parser(
        "detect", help="whether what a latent's strongest passages share tells where else it fires"
    )
    detect.add_argument("--text", help="another than the run's, as in config.data.text")
    detect.add_argument("--rows", type=int, help="held-out rows")
    detect.add_argument("--latents", type=int, default=100, help="so many of each SAE are scored")
    detect.add_argument("--seed", type=int, default=0, help="of the latents and positions that are drawn")
    for command in (probe, detect):
        cli.add_subject(command)
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
    generate = commands.add_parser("generate", help="have Gemma go on with, or answer, the texts of a file")
    generate.add_argument("--model", required=True, help="for example gemma2_2b-it")
    generate.add_argument("--weights", default="", help="Gemma's, as in config.weights")
    generate.add_argument("--tokenizer", default="", help="Gemma's, as in config.tokenizer")
    generate.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="Gemma's")
    generate.add_argument(
        "--prompts", type=pathlib.Path, required=True, help='a file of texts: .jsonl with {"text": …} a line'
    )
    generate.add_argument("--chat", action="store_true", help="each text is a user's turn, to be answered")
    generate.add_argument("--num_tokens", type=int, default=128, help="the most for one prompt")
    generate.add_argument(
        "--temperature", type=float, default=1.0, help="of the draws; 0: the likeliest token"
    )
    generate.add_argument("--seed", type=int, default=0, help="of the draws")
    generate.add_argument("--rows_per_batch", type=int, default=16, help="prompts run together")
    generate.add_argument("--out", type=pathlib.Path, required=True, help="file to write, .jsonl")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> None:
    """Parses the command line and runs one command."""
    parser = _parser()
    args, fields = parser.parse_known_args()
    if args.command == "steer":  # Of prompts argparse leaves over those that stand behind options.
        args.prompts = [*args.prompts, *(text for text in fields if not text.startswith("-"))]
        fields = [text for text in fields if text.startswith("-")]
    options = {name: value for name, value in vars(args).items() if name != "command"}
    if fields and args.command not in ("plan", "prepare"):
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
    elif args.command == "publish":
        from gemma_scope_jax import publish as publish_lib

        publish_lib.publish(args.run, args.out, args.repo, args.format, args.dtype, args.license, args.push)
    elif args.command == "compare":
        from gemma_scope_jax import suites

        suites.compare(args.folders, args.out)
    elif args.command == "explore":
        from gemma_scope_jax import explore as explore_lib

        reading = explore_lib.read(explore_lib.open_scope(args.path), args.text)
        reading.show(args.top)
        if args.html:
            reading.write_html(args.html)
            print(f"Wrote {args.html}", flush=True)
    elif args.command == "steer":
        from gemma_scope_jax.explore import steering

        steering.steer_path(**options)
    elif args.command == "flow":
        from gemma_scope_jax import explore as explore_lib
        from gemma_scope_jax.explore import pictures

        found = explore_lib.flow(explore_lib.open_scope(args.path), args.text, args.answer)
        found.show()
        if args.png:
            pictures.write_png(args.png, found.figure())
            print(f"Wrote {args.png}", flush=True)
            if found.lens:
                beside = args.png.with_stem(f"{args.png.stem}_lens")
                pictures.write_png(beside, found.lens.figure())
                print(f"Wrote {beside}", flush=True)
        if args.html:
            found.write_html(args.html)
            print(f"Wrote {args.html}", flush=True)
    elif args.command == "links":
        from gemma_scope_jax import explore as explore_lib
        from gemma_scope_jax.explore import pictures

        scope = explore_lib.open_scope(args.path)
        found = explore_lib.links(scope, args.sae, args.latent, args.to, args.rows, args.prompt)
        found.show(args.top)
        if args.png:
            pictures.write_png(args.png, found.figure())
            print(f"Wrote {args.png}", flush=True)
    elif args.command == "attribute":
        from gemma_scope_jax.explore import ablating

        ablating.attribute_path(**options)
    elif args.command == "contrast":
        from gemma_scope_jax.explore import audit

        audit.audit(**options)
    elif args.command == "probe":
        from gemma_scope_jax import probing

        probing.probe_path(**options)
    elif args.command == "detect":
        from gemma_scope_jax import detection

        detection.detect_path(**options)
    elif args.command == "dashboards":
        from gemma_scope_jax import config, hosts
        from gemma_scope_jax.explore import build, dashboards

        hosts.initialize(config.HostsConfig().heartbeat_timeout_seconds)
        given = {name: value for name, value in vars(args).items() if name not in ("command", "top")}
        build.build(**given, options=dashboards.Options(top=args.top))
    elif args.command == "prepare":
        if args.workers is not None and args.workers < 1:
            raise ValueError(f"--workers is {args.workers}; it must be at least 1")
        from gemma_scope_jax import config, data, runs

        chosen = config.from_dict(cli.read_config(args.config, fields))
        rows = data.open_rows(runs.prepare_rows(chosen, args.workers), data.TRAIN)
        print(f"{len(rows):,} rows to train on in {rows.folder}.")
    elif args.command == "generate":
        from gemma_scope_jax import config, rollouts

        names = {"model": args.model, "weights": args.weights, "tokenizer": args.tokenizer}
        rollouts.write_rollouts(
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
        cli.find_tpu_compiler()
        from gemma_scope_jax import config, forecast

        chosen = config.from_dict(cli.read_config(args.config, fields))
        if not forecast.show(forecast.forecast(chosen, args.topology)):
            sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
