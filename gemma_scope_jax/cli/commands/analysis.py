"""The commands that look inside the model: `explore`, `attribute`, `flow`, `links`, `steer`, `contrast` and more.

Each imports what it runs when it runs: --help must not take seconds.
"""

import pathlib
import typing
from collections.abc import Callable, Sequence
from typing import Literal

from gemma_scope_jax.cli import common
from gemma_scope_jax.cli.options import (
    AS_SAID,
    Count,
    CountOrNone,
    Dtype,
    Few,
    Flag,
    MaybeCount,
    MaybeNewTokens,
    MaybePlace,
    MaybeText,
    NewTokens,
    Numbers,
    Others,
    Place,
    Positional,
    PositiveOrZero,
    Repeated,
    Seed,
    Share,
    Text,
    Whole,
)
from gemma_scope_jax.runtime.errors import InputError

if typing.TYPE_CHECKING:
    from gemma_scope_jax.analysis import Scope


def explore(
    path: Positional[str],
    prompt: Positional[Text],
    top: Count = 5,
    html: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Show which latents fire on a prompt, by token and SAE.

    gemma-scope explore runs/quickstart "The State of the Union is strong"

    Args:
      path: a run directory, or SAEs in files, as for evaluate.
      prompt: the text.
      top: latents of a token that are listed.
      html: a page to write, too.
      others: of the model and of files.
    """
    common.check_outputs(html=html)
    from gemma_scope_jax import analysis

    found = analysis.read(_open_scope(path, **others.given()), prompt)
    found.show(top)
    if html:
        found.write_html(html)
        _tell(html)


def flow(
    path: Positional[str],
    prompt: Positional[Text],
    answer: MaybeText = None,
    png: MaybePlace = None,
    html: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Follow a prompt through SAEs at many layers, with a logit lens.

    gemma-scope flow runs/all_layers "The capital of France is" --answer " Paris" --html flow.html

    Args:
      path: as for evaluate.
      prompt: the text.
      answer: the token that the lens follows, for example ' Paris'.
      png: a picture to write, and beside it one of the lens.
      html: a page to write, too.
      others: of the model and of files.
    """
    common.check_outputs(png=png, html=html)
    from gemma_scope_jax import analysis

    found = analysis.flow(_open_scope(path, **others.given()), prompt, answer)
    found.show()
    _write_png(png, found.figure)
    if png and found.lens:
        _write_png(png.with_stem(f"{png.stem}_lens"), found.lens.figure)
    if html:
        found.write_html(html)
        _tell(html)


def links(
    path: Positional[str],
    sae: str,
    latent: CountOrNone,
    to: MaybeText = None,
    text: MaybeText = None,
    rows: Count = 8,
    prompt: MaybeText = None,
    top: Count = 20,
    png: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Show which latents of later SAEs a latent feeds.

    gemma-scope links runs/all_layers --sae layer_5_resid_post_width_4096_lambda_0.0005 --latent 12

    Args:
      path: as for evaluate.
      sae: the latent's.
      latent: its number.
      to: only this later SAE; by default all that are.
      text: another than the run's, as data.text of a config.
      rows: of held-out text.
      prompt: in their place.
      top: latents that are listed.
      png: a picture to write, too.
      others: of the model and of files.
    """
    common.check_outputs(png=png)
    from gemma_scope_jax import analysis

    found = analysis.links(_open_scope(path, text=text, **others.given()), sae, latent, to, rows, prompt)
    found.show(top)
    _write_png(png, found.figure)


def attribute(
    path: Positional[str],
    prompt: Positional[MaybeText] = None,
    prompts: MaybePlace = None,
    answer: MaybeText = None,
    against: MaybeText = None,
    token: Whole = -1,
    sae: MaybeText = None,
    integrated: Flag = False,
    ablate: CountOrNone = 0,
    seed: Seed = 0,
    top: Count = 20,
    html: MaybePlace = None,
    png: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Show which latents have a part in a prediction, and how much.

    gemma-scope attribute runs/quickstart "The State of the" --answer " Union" --ablate 20

    Args:
      path: as for evaluate.
      prompt: the text whose next token is predicted.
      prompts: instead, a file of them; .txt with one a line, or .jsonl of {"text": …}.
      answer: the token whose logit it is; by default the likeliest.
      against: the token whose logit is taken off, or "mean", of all; by default the next likeliest.
      token: after which token, from 0, or from the end below 0.
      sae: only this one; by default all, but integrated gradients are of one.
      integrated: integrated gradients, of one SAE.
      ablate: take out so many latents, too, one by one, and compare.
      seed: of the latents that are drawn for that.
      top: latents that are listed.
      html: a page to write, too.
      png: a picture to write, too.
      others: of the model and of files.
    """
    common.check_outputs(html=html, png=png)
    from gemma_scope_jax import analysis
    from gemma_scope_jax.analysis.session import only
    from gemma_scope_jax.data import sources
    from gemma_scope_jax.display import plotting

    if (prompt is None) == (prompts is None):
        raise InputError("give a prompt, or --prompts=FILE, and not both")
    if prompts and (not ablate or integrated or html):
        raise InputError("--prompts goes with --ablate=N and without --integrated and --html")
    texts = sources.read_prompts(prompts) if prompts else None
    scope = _open_scope(path, **others.given())
    if sae is not None:
        scope = only(scope, sae)
    question = {"answer": answer, "against": against, "token": token}
    if prompts:
        made = analysis.ablations_of_prompts(scope, texts, ablate, seed, **question)
        made.show(top)
        _write_png(png, made.figure)
        return
    if integrated:
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


def _open_scope(path: str, **overrides: object) -> "Scope":
    from gemma_scope_jax import analysis

    common.refresh(path)
    return analysis.open_scope(path, **overrides)


def _tell(written: pathlib.Path) -> None:
    common.say(f"Wrote {written}")


def steer(
    path: Positional[str],
    prompts: Positional[tuple[Text, ...]] = (),
    edit: Repeated[str] = (),
    num_tokens: MaybeNewTokens = None,
    temperature: PositiveOrZero = 0.0,
    samples: Few = 1,
    seed: Seed = 0,
    chat: Flag = False,
    html: MaybePlace = None,
    text: MaybeText = None,
    sweep: Flag = False,
    strengths: Numbers = (),
    token: Repeated[Text] = (),
    rows: MaybeCount = None,
    png: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Change latents, and see what Gemma then writes; or measure one change at several strengths.

    gemma-scope steer runs/quickstart "My fellow" --edit 12+3t --samples 2

    gemma-scope steer runs/quickstart --edit 12+t --sweep

    Args:
      path: as for evaluate.
      prompts: to go on with.
      edit: NAME:LATENT and what becomes of it: =ablate, *0.5, +3t or =2t, t being its typical activation; perhaps
        @prompt, @reply or, of tokens from one up to another, @3:7. Of one SAE without its name. May be given again.
      num_tokens: the most for one prompt; by default 40.
      temperature: of the draws; 0: the likeliest token.
      samples: replies to each prompt.
      seed: of the draws.
      chat: a prompt is a user's turn, to be answered.
      html: a page to write, too.
      text: another than the run's to measure on, as data.text of a config.
      sweep: measure the edit NAME:LATENT+t, or =t, at several strengths, in place of replies.
      strengths: so many times the edit each, as in --strengths=-1,0,1; by default -4,-2,-1,0,1,2,4,8.
      token: one whose likelihood is looked at, by default what the decoder raises most. May be given again.
      rows: of held-out text to measure on; by default 16.
      png: a figure to write, too.
      others: of the model and of files.
    """
    common.check_outputs(html=html, png=png)
    if not edit:
        raise InputError("there is no edit; give one, as in --edit 12+3t")
    from gemma_scope_jax import analysis
    from gemma_scope_jax.analysis.steering import edit_syntax, steer
    from gemma_scope_jax.analysis.steering import sweep as sweep_lib

    made = [edit_syntax.parse(text) for text in edit]
    of_replies = {
        "a prompt": prompts, "--html": html, "--chat": chat, "--temperature": temperature, "--samples": samples > 1,
        "--num-tokens": num_tokens,
    }  # fmt: skip
    misplaced = (
        of_replies if sweep else {"--token": token, "--strengths": strengths, "--rows": rows, "--png": png}
    )
    if wrong := [name for name, value in misplaced.items() if value]:
        raise InputError(f"{wrong[0]} is {'not' if sweep else 'only'} for --sweep; leave one of them out")
    if sweep:
        _check_swept(edit, made)
    elif not prompts:
        raise InputError("there is no prompt to go on with; give one, or --sweep")
    scope = _open_scope(path, text=text, **others.given())
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
        by = [once.add * multiple for multiple in strengths or sweep_lib.STRENGTHS]
        swept = analysis.sweep(
            scope, once.sae, once.latent, by, kind, sweep_lib.ROWS if rows is None else rows, token
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


def contrast(
    path: Positional[str],
    first: Place,
    second: Place,
    at: Literal["mean", "max", "last"] = "mean",
    rate: Share = 0.05,
    paired: Flag = False,
    answer: MaybeText = None,
    against: MaybeText = None,
    top: MaybeCount = None,
    seed: Seed = 0,
    text: MaybeText = None,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Find which latents tell two sets of prompts apart, and what is left of a bias without them.

    gemma-scope contrast runs/quickstart --first war.txt --second peace.txt --out contrasted

    Args:
      path: as for evaluate.
      first: prompts; .txt with one a line, or .jsonl.
      second: the others.
      at: of a prompt's tokens.
      rate: of false discoveries.
      paired: line by line they are counterparts.
      answer: a token whose logit is the behaviour, such as " she".
      against: the token whose logit is taken off it.
      top: ablate only so many latents, the strongest.
      seed: of shuffles, halves and random sets.
      text: another than the run's to measure the delta loss on.
      out: folder for contrast.json, contrast.png and correction.json.
      others: of the model and of files.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.cli import contrast as contrast_lib

    contrast_lib.audit(
        path, first, second, at, rate, paired, answer, against, top, seed, out, text=text, **others.given()
    )


def dashboards(
    path: Positional[str],
    text: MaybeText = None,
    rows: Count = 512,
    rows_per_batch: MaybeCount = None,
    sae: Repeated[str] = (),
    top: Few = 20,
    neuronpedia: Flag = False,
    out: MaybePlace = None,
    others: Others = AS_SAID,
) -> None:
    """Write pages of what each latent fires on, which need neither server nor network.

    gemma-scope dashboards runs/quickstart --rows 64

    Args:
      path: as for evaluate.
      text: another than the run's, as data.text of a config.
      rows: of held-out text to read.
      rows_per_batch: in one pass of the model.
      sae: only this one. May be given again.
      top: passages of a latent's strongest firings.
      neuronpedia: Neuronpedia's batch files, too.
      out: folder to write to; by default dashboards in the folder for results.
      others: of the model and of files.
    """
    common.check_outputs(out=out)
    from gemma_scope_jax.analysis.dashboards import build, collect
    from gemma_scope_jax.runtime import distributed

    distributed.initialize()
    common.refresh(path)
    build.build(
        path,
        rows,
        sae,
        out,
        collect.Options(top=top),
        rows_per_batch,
        neuronpedia,
        text=text,
        **others.given(),
    )


def generate(
    model: str,
    prompts: Place,
    out: Place,
    weights: str = "",
    tokenizer: str = "",
    dtype: Dtype = "bfloat16",
    chat: Flag = False,
    num_tokens: NewTokens = 128,
    temperature: PositiveOrZero = 1.0,
    seed: Seed = 0,
    rows_per_batch: Count = 16,
) -> None:
    """Have Gemma go on with, or answer, the texts of a file.

    gemma-scope generate --model gemma2_2b-it --prompts questions.jsonl --chat --out replies.jsonl

    Args:
      model: for example gemma2_2b-it.
      prompts: a file of texts; .jsonl with {"text": …} a line.
      out: file to write, .jsonl.
      weights: Gemma's; a folder, a file or hf://OWNER/NAME.
      tokenizer: Gemma's; a file, or a folder that has one.
      dtype: Gemma's.
      chat: each text is a user's turn, to be answered.
      num_tokens: the most for one prompt.
      temperature: of the draws; 0: the likeliest token.
      seed: of the draws.
      rows_per_batch: prompts run together.
    """
    common.check_outputs(file=out)
    from gemma_scope_jax import config
    from gemma_scope_jax.cli import generate as generate_lib

    names = {"model": model, "weights": weights, "tokenizer": tokenizer, "gemma_dtype": dtype}
    generate_lib.write_rollouts(
        config.from_dict(names), prompts, out, num_tokens, temperature, seed, chat, rows_per_batch
    )
