"""The commands that look inside the model, of `python -m gemma_scope_jax`.

Each imports what it runs when it runs: --help should not take seconds.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence

from gemma_scope_jax.cli import common
from gemma_scope_jax.cli.common import say
from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import well_formed
from gemma_scope_jax.runtime.ranges import COUNT, COUNT_OR_NONE, FEW, NEW_TOKENS, SEED


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands; each sets `call`, to be called with all of its options."""
    for add in (
        _add_explore,
        _add_flow,
        _add_links,
        _add_attribute,
        _add_steer,
        _add_contrast,
        _add_dashboards,
    ):
        add(commands)


def _add(
    commands: argparse._SubParsersAction, name: str, call: Callable[..., None], about: str
) -> argparse.ArgumentParser:
    """A command that opens a path as evaluate.py does, with what it can say of it."""
    command = commands.add_parser(name, help=about)
    command.set_defaults(call=call)
    command.add_argument("path", help="a run directory, or SAEs in files, as for evaluate.py")
    common.add_overrides(command)
    return command


def _add_explore(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "explore", run_explore, "which latents fire on a prompt, by token and SAE")
    command.add_argument("prompt", type=well_formed)
    command.add_argument(
        "--top", type=common.number(COUNT), default=5, help="latents of a token that are listed"
    )
    command.add_argument("--html", type=common.path, help="a page to write, too")


def _add_flow(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "flow", run_flow, "a prompt through SAEs at many layers, with a logit lens")
    command.add_argument("prompt", type=well_formed)
    command.add_argument(
        "--answer", type=well_formed, help="the token that the lens follows, for example ' union'"
    )
    command.add_argument("--png", type=common.path, help="a picture to write, and beside it one of the lens")
    command.add_argument("--html", type=common.path, help="a page to write, too")


def _add_links(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "links", run_links, "which latents of later SAEs a latent feeds")
    command.add_argument("--sae", required=True, help="the latent's")
    command.add_argument("--latent", type=common.number(COUNT_OR_NONE), required=True)
    command.add_argument("--to", help="only this later SAE (default: all that are)")
    command.add_argument("--text", help="another than the run's, as in config.data.text")
    command.add_argument("--rows", type=common.number(COUNT), default=8, help="of held-out text")
    command.add_argument("--prompt", type=well_formed, help="in their place")
    command.add_argument("--top", type=common.number(COUNT), default=20, help="latents that are listed")
    command.add_argument("--png", type=common.path, help="a picture to write, too")


def _add_attribute(commands: argparse._SubParsersAction) -> None:
    about = "which latents have a part in a prediction, and how much"
    command = _add(commands, "attribute", run_attribute, about)
    command.add_argument("prompt", type=well_formed, nargs="?", help="the text whose next token is predicted")
    command.add_argument(
        "--prompts",
        type=common.path,
        help='instead, a file of them: .txt with one a line, or .jsonl of {"text": …}',
    )
    command.add_argument(
        "--answer", type=well_formed, help="the token whose logit it is (default: the likeliest)"
    )
    command.add_argument(
        "--against",
        type=well_formed,
        help="the token whose logit is taken off, or mean, of all (default: the next likeliest)",
    )
    command.add_argument(
        "--token",
        type=common.number(ranges.WHOLE),
        default=-1,
        help="behind which token, from 0, or from the end below 0",
    )
    command.add_argument("--sae", help="only this one (default: all; --integrated is of one)")
    command.add_argument(
        "--integrated", action="store_true", dest="is_integrated", help="integrated gradients, of one SAE"
    )
    command.add_argument(
        "--ablate",
        type=common.number(COUNT_OR_NONE),
        default=0,
        help="take out so many latents, too, one by one, and compare",
    )
    command.add_argument(
        "--seed", type=common.number(SEED), default=0, help="of the latents that are drawn for that"
    )
    command.add_argument("--top", type=common.number(COUNT), default=20, help="latents that are listed")
    command.add_argument("--html", type=common.path, help="a page to write, too")
    command.add_argument("--png", type=common.path, help="a picture to write, too")


def _add_steer(commands: argparse._SubParsersAction) -> None:
    command = _add(commands, "steer", run_steer, "change latents, and see what Gemma then writes")
    command.add_argument("prompts", type=well_formed, nargs="*", help="to go on with")
    command.add_argument(
        "--edit",
        action="append",
        required=True,
        help="NAME:LATENT and what becomes of it: =ablate, *0.5, +3t or =2t, t being its typical activation; perhaps "
        "@prompt, @reply or, of tokens from one up to another, @3:7. May be repeated; of one SAE without its name",
    )
    command.add_argument(
        "--num_tokens", type=common.number(NEW_TOKENS), help="the most for one prompt (default: 40)"
    )
    command.add_argument(
        "--temperature",
        type=common.number(ranges.POSITIVE_OR_ZERO, float),
        default=0.0,
        help="of the draws; 0: the likeliest token",
    )
    command.add_argument("--samples", type=common.number(FEW), default=1, help="replies to each prompt")
    command.add_argument("--seed", type=common.number(SEED), default=0, help="of the draws")
    command.add_argument("--chat", action="store_true", help="a prompt is a user's turn, to be answered")
    command.add_argument("--html", type=common.path, help="a page to write, too")
    command.add_argument("--text", help="another than the run's to measure on, as in config.data.text")
    sweep = command.add_argument_group("in place of replies")
    sweep.add_argument(
        "--sweep", action="store_true", help="measure the edit NAME:LATENT+t, or =t, at several strengths"
    )
    sweep.add_argument(
        "--strengths",
        type=_strengths,
        dest="multiples",
        metavar="N,N",
        help="so many times the edit each (default: -4,-2,-1,0,1,2,4,8)",
    )
    sweep.add_argument(
        "--token",
        action="append",
        type=well_formed,
        default=[],
        dest="tokens",
        metavar="TEXT",
        help="one whose likelihood is looked at; may be repeated (default: what the decoder raises most)",
    )
    sweep.add_argument(
        "--rows", type=common.number(COUNT), help="of held-out text to measure on (default: 16)"
    )
    sweep.add_argument("--png", type=common.path, help="a figure to write, too")


def _add_contrast(commands: argparse._SubParsersAction) -> None:
    about = "which latents tell two sets of prompts apart, and what is left of a bias without them"
    command = _add(commands, "contrast", run_contrast, about)
    for name in ("first", "second"):
        command.add_argument(
            f"--{name}", type=common.path, required=True, help="prompts: .txt with one a line, or .jsonl"
        )
    command.add_argument("--at", choices=("mean", "max", "last"), default="mean", help="of a prompt's tokens")
    command.add_argument(
        "--rate", type=common.number(ranges.SHARE, float), default=0.05, help="of false discoveries"
    )
    command.add_argument(
        "--paired", action="store_true", dest="is_paired", help="line by line they are counterparts"
    )
    command.add_argument(
        "--answer", type=well_formed, help='a token whose logit is the behaviour, such as " she"'
    )
    command.add_argument("--against", type=well_formed, help="the token whose logit is taken off it")
    command.add_argument(
        "--top", type=common.number(COUNT), help="ablate only so many latents, the strongest"
    )
    command.add_argument(
        "--seed", type=common.number(SEED), default=0, help="of shuffles, halves and random sets"
    )
    command.add_argument("--text", help="another than the run's to measure the delta loss on")
    command.add_argument("--out", type=common.path, help="folder for contrast.json, .png, correction.json")


def _add_dashboards(commands: argparse._SubParsersAction) -> None:
    about = "pages of what each latent fires on, which need neither server nor network"
    command = _add(commands, "dashboards", run_dashboards, about)
    command.add_argument("--text", help="another than the run's, as in config.data.text")
    command.add_argument("--rows", type=common.number(COUNT), default=512, help="of held-out text to read")
    command.add_argument("--rows_per_batch", type=common.number(COUNT), help="in one pass of the model")
    command.add_argument(
        "--sae", action="append", default=[], dest="saes", help="only this one; may be repeated"
    )
    command.add_argument(
        "--top", type=common.number(FEW), default=20, help="passages of a latent's strongest firings"
    )
    command.add_argument(
        "--neuronpedia", action="store_true", dest="is_for_neuronpedia", help="its batch files, too"
    )
    command.add_argument(
        "--out",
        type=common.path,
        help="folder to write to (default: dashboards in the folder for results)",
    )


def _strengths(text: str) -> list[float]:
    return [common.number(ranges.SIGNED, float)(one) for one in text.split(",")]


def run_explore(path: str, prompt: str, top: int, html: pathlib.Path | None, **overrides: str | None) -> None:
    """A prompt as the SAEs read it; see `analysis.read`."""
    from gemma_scope_jax import analysis

    reading = analysis.read(analysis.open_scope(path, **overrides), prompt)
    reading.show(top)
    if html:
        reading.write_html(html)
        _tell(html)


def run_flow(
    path: str,
    prompt: str,
    answer: str | None,
    png: pathlib.Path | None,
    html: pathlib.Path | None,
    **overrides: str | None,
) -> None:
    """A prompt through the layers; see `analysis.flow`."""
    from gemma_scope_jax import analysis

    found = analysis.flow(analysis.open_scope(path, **overrides), prompt, answer)
    found.show()
    _write_png(png, found.figure)
    if png and found.lens:
        _write_png(png.with_stem(f"{png.stem}_lens"), found.lens.figure)
    if html:
        found.write_html(html)
        _tell(html)


def run_links(
    path: str,
    sae: str,
    latent: int,
    to: str | None,
    rows: int,
    prompt: str | None,
    top: int,
    png: pathlib.Path | None,
    **overrides: str | None,
) -> None:
    """What a latent feeds; see `analysis.links`."""
    from gemma_scope_jax import analysis

    found = analysis.links(analysis.open_scope(path, **overrides), sae, latent, to, rows, prompt)
    found.show(top)
    _write_png(png, found.figure)


def _tell(written: pathlib.Path) -> None:
    say(f"Wrote {written}")


def run_attribute(
    path: str,
    prompt: str | None,
    prompts: pathlib.Path | None,
    answer: str | None,
    against: str | None,
    token: int,
    sae: str | None,
    is_integrated: bool,
    ablate: int,
    seed: int,
    top: int,
    html: pathlib.Path | None,
    png: pathlib.Path | None,
    **overrides: str | None,
) -> None:
    """Attributes at one prompt, or holds attributions at many against ablation.

    Args:
      path: see `open_scope`.
      prompt: one.
      prompts: instead of it, a file of them; see `sources.read_prompts`.
      answer: see `attribute`, also for the next two.
      against: see above.
      token: see above.
      sae: only this one; None: all.
      is_integrated: integrated gradients, of one SAE.
      ablate: so many latents of each prompt are taken out; 0: none.
      seed: see `ablations`.
      top: how many latents are shown.
      html: a page to write.
      png: a picture to write, of the parts or, of many prompts, of the ablations.
      **overrides: see `opening.open_path`.

    Raises:
      ValueError: options that do not go together; see also `attribute`, `integrate` and `ablations`.
    """
    from gemma_scope_jax import analysis
    from gemma_scope_jax.analysis.session import only
    from gemma_scope_jax.data import sources
    from gemma_scope_jax.display import plotting

    if (prompt is None) == (prompts is None):
        raise InputError("give a prompt, or --prompts=FILE, and not both")
    if prompts and (not ablate or is_integrated or html):
        raise InputError("--prompts goes with --ablate=N and without --integrated and --html")
    texts = sources.read_prompts(prompts) if prompts else None
    scope = analysis.open_scope(path, **overrides)
    if sae is not None:
        scope = only(scope, sae)
    question = {"answer": answer, "against": against, "token": token}
    if prompts:
        made = analysis.ablations_of_prompts(scope, texts, ablate, seed, **question)
        made.show(top)
        _write_png(png, made.figure)
        return
    if is_integrated:
        if len(scope.subjects) > 1:
            raise InputError(f"--integrated is of one SAE; give --sae, of {', '.join(scope.subjects)}")
        found = analysis.integrate(scope, prompt, next(iter(scope.subjects)), **question)
    else:
        found = analysis.attribute(scope, prompt, **question)
    found.show(top)
    shown = {}
    if ablate:
        made = analysis.ablations(scope, found, ablate, seed)
        made.show(top)
        shown = {"Held against ablation": plotting.png(made.figure())}
    if html:
        found.write_html(html, top, shown)
        _tell(html)
    _write_png(png, found.figure)


def _write_png(path: pathlib.Path | None, draw: Callable[[], object]) -> None:
    from gemma_scope_jax.display import plotting

    if path:
        plotting.write_png(path, draw())
        _tell(path)


def run_steer(
    path: str,
    prompts: Sequence[str],
    edit: Sequence[str],
    num_tokens: int | None,
    temperature: float,
    samples: int,
    seed: int,
    chat: bool,
    html: pathlib.Path | None,
    sweep: bool,
    multiples: Sequence[float] | None,
    tokens: Sequence[str],
    png: pathlib.Path | None,
    rows: int | None,
    **overrides: str | None,
) -> None:
    """`steer.steer`, or of one edit `sweep.sweep`.

    Args:
      path: see `opening.open_path`.
      prompts: see `steer`.
      edit: edits as `specs` writes them.
      num_tokens: see `steer`; None: `steer.NUM_TOKENS`.
      temperature: likewise.
      samples: likewise.
      seed: likewise.
      chat: likewise.
      html: a page to write.
      sweep: whether the edit is swept over.
      multiples: of the edit; None: `sweep.STRENGTHS`.
      tokens: see `sweep.sweep`.
      png: of the sweep's figure.
      rows: see `sweep.sweep`; None: `sweep.ROWS`.
      **overrides: see `opening.open_path`.

    Raises:
      ValueError: an edit is not written as one, or options do not go together.
    """
    from gemma_scope_jax import analysis
    from gemma_scope_jax.analysis.steering import edit_syntax, steer
    from gemma_scope_jax.analysis.steering import sweep as sweep_lib

    made = [edit_syntax.parse(text) for text in edit]
    of_replies = {
        "a prompt": prompts, "--html": html, "--chat": chat, "--temperature": temperature, "--samples": samples > 1,
        "--num_tokens": num_tokens,
    }  # fmt: skip
    others = (
        of_replies if sweep else {"--token": tokens, "--strengths": multiples, "--rows": rows, "--png": png}
    )
    if wrong := [name for name, value in others.items() if value]:
        raise InputError(f"{wrong[0]} is {'not' if sweep else 'only'} for --sweep; leave one of them out")
    if sweep:
        _check_swept(edit, made)
    elif not prompts:
        raise InputError("there is no prompt to go on with; give one, or --sweep")
    scope = analysis.open_scope(path, **overrides)
    if not sweep:
        changes = edit_syntax.resolve(scope, made)
        length = steer.NUM_TOKENS if num_tokens is None else num_tokens
        steered = analysis.steer(scope, prompts, changes, length, temperature, samples, seed, chat)
        steered.show()
        if html:
            steered.write_html(html)
            _tell(html)
    else:
        once = edit_syntax.named(scope, made[0].edit)
        kind = "add" if once.scale else "clamp"
        by = [once.add * multiple for multiple in multiples or sweep_lib.STRENGTHS]
        swept = analysis.sweep(
            scope, once.sae, once.latent, by, kind, sweep_lib.ROWS if rows is None else rows, tokens
        )
        swept.show()
        _write_png(png, swept.figure)


def _check_swept(written: Sequence[str], made: Sequence[object]) -> None:
    if (
        len(made) != 1
        or not made[0].is_typical
        or made[0].edit.scale not in (0, 1)
        or made[0].edit.tokens != "all"
    ):
        raise InputError(
            f"--edit is {', '.join(written)}, but a sweep is of one latent at all tokens, in typical activations; "
            "write it as in NAME:12+t, or NAME:12=t for clamping it"
        )


def run_contrast(**options: object) -> None:
    """See `audit.audit`."""
    from gemma_scope_jax.analysis.contrasts import audit

    audit.audit(**options)


def run_dashboards(top: int, **options: object) -> None:
    """See `build.build`."""
    from gemma_scope_jax.analysis.dashboards import build, collect
    from gemma_scope_jax.runtime import distributed

    distributed.initialize()
    build.build(**options, options=collect.Options(top=top))
